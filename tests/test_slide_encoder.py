"""The slide encoder: positions in closed form, batches of unequal slides, pooling, and what is refused."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, Trainer, TrainingArguments
from transformers.utils import logging as transformers_logging

from modeling_longnet import (
    LongNetSlideEncoderConfig,
    LongNetSlideEncoderForImageClassification,
    LongNetSlideEncoderModel,
    make_model_card,
)


PRESETS = sorted((Path(__file__).parent.parent / "configuration").glob("longnet-slide-encoder-*"))
SMALL = {
    "in_chans": 12, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "slide_ngrids": 20, "segment_lengths": [8, 24, 64], "dilation_rates": [1, 2, 4],
}  # fmt: skip


def small_model(**fields) -> LongNetSlideEncoderModel:
    torch.manual_seed(0)
    model = LongNetSlideEncoderModel(LongNetSlideEncoderConfig(**SMALL, **fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def slides(batch: int, tiles: int) -> tuple[torch.Tensor, torch.Tensor]:
    coords = torch.randint(0, 20 * 256, (batch, tiles, 2)).float()
    return torch.randn(batch, tiles, 12), coords


def test_positions_are_those_of_the_dense_table():
    """The table as the original builds it: for each cell of a grid, the column's features, then the row's."""
    model = small_model()
    rows, columns = torch.meshgrid(torch.arange(20), torch.arange(20), indexing="ij")
    frequencies = 1 / 10000 ** (torch.arange(8, dtype=torch.float64) / 8)
    angles = [places.reshape(-1, 1) * frequencies for places in (columns, rows)]
    table = torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], dim=1).float()
    coords = torch.stack([rows, columns], dim=-1).reshape(1, -1, 2) * 256 + torch.randint(0, 256, (1, 400, 2))
    cells = torch.floor(coords.float() / 256)
    index = (cells[..., 0] * 20 + cells[..., 1]).long()
    for kind in (torch.int32, torch.int64, torch.float32, torch.float64):
        assert torch.equal(model.embeddings.position_embedding(coords.to(kind)), table[index])


def test_positions_need_no_table_of_the_grid():
    with torch.device("meta"):
        model = LongNetSlideEncoderModel(LongNetSlideEncoderConfig(num_hidden_layers=1))
    assert sum(buffer.nbytes for buffer in model.buffers()) < 2e6
    assert not any("position" in key for key in model.state_dict())


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("side", ["right", "left", "between"])
def test_padding_invariance(pooling, side):
    model = small_model(pooling=pooling)
    lengths = [70, 13, 41]
    tiles, coords = slides(3, 70)
    coords[1, 13:], tiles[1, 13:] = torch.nan, torch.nan  # padding may hold anything
    coords[2, 41:], tiles[2, 41:] = -1e9, 1e4
    mask = torch.arange(70) < torch.tensor(lengths)[:, None]
    order = torch.arange(70).expand(3, 70).clone()
    if side == "left":
        order = order.flip(1)
    elif side == "between":
        order = torch.stack([torch.randperm(70) for _ in range(3)])
    arranged = [torch.stack([x[b, order[b]] for b in range(3)]) for x in (tiles, coords, mask)]
    with torch.no_grad():
        batch = model(*arranged[:2], attention_mask=arranged[2].long(), output_hidden_states=True)
        for b, real in enumerate(arranged[2]):
            alone = model(*(x[b : b + 1, real] for x in arranged[:2]), output_hidden_states=True)
            torch.testing.assert_close(batch.pooler_output[b], alone.pooler_output[0], rtol=0, atol=1e-5)
            for together, single in zip(batch.layer_embeddings, alone.layer_embeddings):
                torch.testing.assert_close(together[b], single[0], rtol=0, atol=1e-5)
            places = torch.cat([torch.ones(1, dtype=torch.bool), real])
            together_and_single = zip(
                (batch.last_hidden_state, *batch.hidden_states), (alone.last_hidden_state, *alone.hidden_states)
            )
            for together, single in together_and_single:
                torch.testing.assert_close(together[b, places], single[0], rtol=0, atol=1e-5)


def test_a_mask_of_ones_changes_nothing():
    model, (tiles, coords) = small_model(), slides(2, 33)
    with torch.no_grad():
        without, with_mask = model(tiles, coords), model(tiles, coords, torch.ones(2, 33))
    assert torch.equal(without.pooler_output, with_mask.pooler_output)


def test_the_order_of_a_batch_does_not_matter():
    model, (tiles, coords) = small_model(), slides(3, 29)
    with torch.no_grad():
        forward, backward = model(tiles, coords), model(tiles.flip(0), coords.flip(0))
    torch.testing.assert_close(forward.pooler_output, backward.pooler_output.flip(0), rtol=0, atol=1e-6)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_pooling_follows_from_the_hidden_states(pooling):
    model, (tiles, coords) = small_model(pooling=pooling), slides(2, 30)
    with torch.no_grad():
        output = model(tiles, coords, output_hidden_states=True)
        for states, embedding in (
            (output.last_hidden_state, output.pooler_output), *zip(output.hidden_states, output.layer_embeddings)
        ):  # fmt: skip
            pooled = states[:, 0] if pooling == "cls" else states[:, 1:].mean(1)
            torch.testing.assert_close(embedding, model.pooler.norm(pooled))
        assert torch.equal(output.last_hidden_state, model.norm(output.hidden_states[-1]))
    assert output.last_hidden_state.shape == (2, 31, 32) and len(output.hidden_states) == 3
    assert model(tiles, coords).hidden_states is None


def test_eager_gives_attentions_and_the_same_numbers():
    model, (tiles, coords) = small_model(), slides(1, 30)
    with torch.no_grad():
        wanted = model(tiles, coords).pooler_output
        model.set_attn_implementation("eager")
        output = model(tiles, coords, output_attentions=True)
    torch.testing.assert_close(output.pooler_output, wanted, rtol=0, atol=1e-5)
    assert [weights.shape for weights in output.attentions] == [(1, 4, 31, 31)] * 2


def test_every_parameter_gets_a_gradient_also_with_checkpointing():
    model, (tiles, coords) = small_model(hidden_dropout=0.0, drop_path_rate=0.0).train(), slides(2, 40)
    mask = torch.arange(40) < torch.tensor([[40], [25]])
    gradients = []
    for checkpointing in (False, True):
        model.gradient_checkpointing_enable() if checkpointing else None
        model.zero_grad()
        model(tiles, coords, mask).pooler_output.square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients[0].values())
    torch.testing.assert_close(gradients[0], gradients[1])


class FirstFeatureTrainer(Trainer):
    """Teaches a slide's first feature to be its label: the encoder has no task head of its own."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = torch.nn.functional.mse_loss(outputs.pooler_output[:, 0], labels)
        return (loss, outputs) if return_outputs else loss


@pytest.mark.filterwarnings("ignore")
def test_trainer_fits_slides_and_saves_what_it_fitted(tmp_path):
    torch.manual_seed(0)
    embeddings, coords = slides(4, 30)
    data = [{"tile_embeds": e, "coords": c, "labels": torch.tensor(float(i % 2))} for i, (e, c) in
            enumerate(zip(embeddings, coords))]  # fmt: skip
    arguments = TrainingArguments(
        str(tmp_path), max_steps=12, per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1, use_cpu=True,
        remove_unused_columns=False, report_to="none", save_steps=12, disable_tqdm=True,
    )  # fmt: skip
    model = small_model()
    trainer = FirstFeatureTrainer(model=model, args=arguments, train_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 12 and losses[-1] < 0.5 * losses[0]
    saved = LongNetSlideEncoderModel.from_pretrained(tmp_path / "checkpoint-12")
    assert all(torch.equal(tensor, saved.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_save_load_is_the_identity(tmp_path):
    model, (tiles, coords) = small_model(), slides(1, 30)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is LongNetSlideEncoderModel and loaded.config.to_dict().keys() == model.config.to_dict().keys()
    with torch.no_grad():
        assert torch.equal(loaded(tiles, coords).pooler_output, model(tiles, coords).pooler_output)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_and_keeps_its_dtype(dtype, tmp_path):
    model, (tiles, coords) = small_model(), slides(1, 60)
    model.save_pretrained(tmp_path)
    half = AutoModel.from_pretrained(tmp_path, dtype=dtype)
    with torch.no_grad():
        wanted, got = model(tiles, coords).pooler_output, half(tiles.to(dtype), coords).pooler_output
    assert got.dtype == dtype
    assert (got.float() - wanted).abs().max() < 16 * torch.finfo(dtype).eps * wanted.abs().max()


class Messages(logging.Handler):
    """What Transformers' loggers say."""

    def __init__(self):
        super().__init__()
        self.texts = []

    def emit(self, record):
        self.texts.append(record.getMessage())


@pytest.fixture
def messages():
    handler, logger = Messages(), logging.getLogger("modeling_longnet")
    transformers_logging.warning_once.cache_clear()
    logger.addHandler(handler)
    yield handler.texts
    logger.removeHandler(handler)
    transformers_logging.warning_once.cache_clear()


def test_indices_of_a_grid_for_coordinates_are_warned_of_once(messages):
    model, (tiles, coords) = small_model(), slides(2, 10)
    mask = torch.arange(10) < torch.tensor([[10], [1]])
    with torch.no_grad():
        model(tiles, coords)
        model(tiles, coords, mask)  # one slide with a single tile, which has one cell by right
        assert not messages
        for _ in range(2):
            model(tiles, torch.stack([coords[0], coords[1] % 20]))
    assert len(messages) == 1 and "all tiles of a slide into one cell" in messages[0]


def test_hidden_tiles_do_not_hide_that_all_others_share_a_cell(messages):
    model, (tiles, coords) = small_model(), slides(1, 10)
    coords[0, :4] = torch.arange(4)[:, None].float()
    with torch.no_grad():
        model(tiles, coords, torch.arange(10)[None] < 4)
    assert len(messages) == 1


@pytest.mark.parametrize("given", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("own", [torch.float32, torch.bfloat16])
def test_features_of_any_floating_dtype_are_taken_to_the_models(given, own):
    model, (tiles, coords) = small_model().to(own), slides(1, 20)
    with torch.no_grad():
        got, wanted = model(tiles.to(given), coords), model(tiles.to(given).to(own), coords)
    assert got.pooler_output.dtype == own and torch.equal(got.pooler_output, wanted.pooler_output)


def test_features_that_are_no_floating_point_numbers_are_refused_by_name():
    model, (tiles, coords) = small_model(), slides(1, 20)
    for dtype in (torch.int64, torch.bool):
        with pytest.raises(ValueError, match=f"`tile_embeds` must be floating point numbers, got {dtype}"):
            model(tiles.to(dtype), coords)


@pytest.mark.parametrize("layers", [None, [1], [0, 2]])
def test_the_head_reads_the_embedding_that_the_configuration_names(layers, tmp_path):
    torch.manual_seed(0)
    config = LongNetSlideEncoderConfig(**SMALL, num_labels=3, classifier_layers=layers)
    model, (tiles, coords) = LongNetSlideEncoderForImageClassification(config).eval(), slides(2, 40)
    mask, labels = torch.arange(40) < torch.tensor([[40], [25]]), torch.tensor([2, 0])
    with torch.no_grad():
        output, body = model(tiles, coords, mask, labels=labels), model.model(tiles, coords, mask)
    read = body.pooler_output if layers is None else torch.cat([body.layer_embeddings[i] for i in layers], dim=-1)
    torch.testing.assert_close(output.logits, model.classifier(read))
    torch.testing.assert_close(output.loss, torch.nn.functional.cross_entropy(output.logits, labels))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(tiles, coords, mask).logits, output.logits)
        body = AutoModel.from_pretrained(tmp_path)  # the encoder of a model with a head, and a head for an encoder
        assert torch.equal(body(tiles, coords).pooler_output, model.model(tiles, coords).pooler_output)
        body.save_pretrained(tmp_path / "body")
        again = LongNetSlideEncoderForImageClassification.from_pretrained(tmp_path / "body", num_labels=5)
        assert again(tiles, coords).logits.shape == (2, 5)
        assert torch.equal(again.model(tiles, coords).pooler_output, body(tiles, coords).pooler_output)


@pytest.mark.parametrize("labels, columns", [([0.5, -1.0], 1), ([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]], 3)])
def test_the_loss_follows_the_labels(labels, columns):
    config = LongNetSlideEncoderConfig(**SMALL, num_labels=columns)
    model, (tiles, coords) = LongNetSlideEncoderForImageClassification(config).eval(), slides(2, 20)
    output = model(tiles, coords, labels=torch.tensor(labels))
    loss = torch.nn.functional.mse_loss if columns == 1 else torch.nn.functional.binary_cross_entropy_with_logits
    torch.testing.assert_close(output.loss, loss(output.logits.squeeze(-1), torch.tensor(labels)))


@pytest.mark.filterwarnings("ignore")
def test_accumulated_steps_of_the_trainer_are_one_larger_batch(tmp_path):
    """The loss is a mean, which the Trainer must divide by the steps that it accumulates."""
    embeddings, coords = slides(4, 30)
    data = [{"tile_embeds": e, "coords": c, "labels": torch.tensor(i % 2)} for i, (e, c) in
            enumerate(zip(embeddings, coords))]  # fmt: skip
    weights = []
    for size, steps in ((4, 1), (1, 4)):
        torch.manual_seed(0)
        config = LongNetSlideEncoderConfig(**SMALL, num_labels=2, hidden_dropout=0.0, drop_path_rate=0.0)
        model = LongNetSlideEncoderForImageClassification(config)
        arguments = TrainingArguments(
            str(tmp_path), max_steps=2, per_device_train_batch_size=size, gradient_accumulation_steps=steps,
            learning_rate=0.1, optim="sgd", max_grad_norm=0.0, use_cpu=True, remove_unused_columns=False,
            report_to="none", save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        Trainer(model=model, args=arguments, train_dataset=data).train()
        weights.append(model.classifier.weight.detach().clone())
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "spoil, message",
    [(lambda t, c: (t, c.half()), "`coords`.*half precisions"), (lambda t, c: (t, c.bfloat16()), "`coords`"),
     (lambda t, c: (t, c - 6000), "`coords` must lie in a grid"),
     (lambda t, c: (t, c + 20 * 256), "from 0 to below 5120"),
     (lambda t, c: (t, c * torch.nan), "nan"), (lambda t, c: (t, c[..., :1]), "`coords` must have shape"),
     (lambda t, c: (t[..., :5], c), "`tile_embeds` must have shape"), (lambda t, c: (t[:, :0], c[:, :0]), "one tile"),
     (lambda t, c: (t, c, torch.ones(2, 9)), "`attention_mask` must have shape"),
     (lambda t, c: (t, c, torch.zeros(2, 10)), "at least one tile")],
    ids=["float16", "bfloat16", "negative", "beyond", "nan", "one-coordinate", "width", "empty", "mask", "all-hidden"],
)  # fmt: skip
def test_bad_inputs_are_refused(spoil, message):
    with pytest.raises(ValueError, match=message):
        small_model()(*spoil(*slides(2, 10)))


@pytest.mark.parametrize(
    "fields, message",
    [({"pooling": "max"}, "`pooling`"), ({"hidden_size": 30, "num_attention_heads": 5}, "`hidden_size`.*multiple of 4"),
     ({"num_attention_heads": 5}, "multiple of `num_attention_heads`"), ({"slide_ngrids": 0}, "`slide_ngrids`"),
     ({"segment_lengths": [8, 16]}, "dilation_rates"),
     ({"segment_lengths": None, "max_wsi_size": 4096}, "`max_wsi_size`"),
     ({"pooler_norm_eps": 0.0}, "`pooler_norm_eps`"), ({"hidden_dropout": 1.0}, "`hidden_dropout`"),
     ({"classifier_layers": [3]}, "`classifier_layers` must name layers from 0 to `num_hidden_layers=2`"),
     ({"classifier_layers": []}, "`classifier_layers`"),
     ({"head_offsets": "other"}, "head_offsets"), ({"hidden_act": "nope"}, "`hidden_act`")],
)  # fmt: skip
def test_bad_configurations_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        LongNetSlideEncoderConfig(**{**SMALL, **fields})


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.name)
def test_every_preset_has_its_published_size(path):
    config = AutoConfig.from_pretrained(path)
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    millions = {"12l-768d": 86.3, "24l-1024d": 304.1, "12l-1536d": 342.5}
    assert len(PRESETS) == 3 and config.segment_lengths == LongNetSlideEncoderConfig().segment_lengths
    assert model.num_parameters() / 1e6 == pytest.approx(millions[path.name.split("encoder-")[1]], abs=0.1)


def test_a_model_card_can_be_written():
    """As every push of a model does."""
    card = make_model_card(LongNetSlideEncoderModel(LongNetSlideEncoderConfig(num_hidden_layers=1)))
    assert "1,048,576" in card.text


def test_a_whole_slide_fits_in_three_gigabytes(tmp_path):
    """10,000 tiles through the 12-layer shape in a process of its own: one layer, as memory holds one at a time."""
    root = Path(__file__).parent.parent
    command = ["-m", "examples.benchmarks.slide_encoder_memory", "--tiles", "10000", "--num-layers", "1"]
    command += ["--output", str(tmp_path / "result.json")]
    environment = {"PYTHONPATH": str(root), "PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    weights_of_other_layers = 11 * 7.1e6 * 4 / 1e9
    assert result["tiles"] == 10_000 and result["peak_gb"] + weights_of_other_layers < 3
