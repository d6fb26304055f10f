"""Composite models: the part that writes text is patched, found by itself, and the rest is left as it was."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_families import make_tiny
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForImageTextToText, DynamicCache

from modeling_longnet.dilated_attention_reference import dilated_attention_reference
from modeling_longnet.dilated_cache import DilatedCache
from modeling_longnet.exporting import export_patched_model
from modeling_longnet.model_card import TAGS, make_model_card
from modeling_longnet.patch_probe import text_part
from modeling_longnet.patching import is_patched, load_patched_model, patch_model, report, unpatch_model
from modeling_longnet.sequence_parallel import SequenceParallel
from modeling_longnet.streaming import stream_loss
from modeling_longnet.transformers_compat import CACHE, named_cache


SCHEDULE = ([8, 32], [1, 4])
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
IMAGE, START = 90, 91  # token ids of the places of a picture, and of its beginning in Qwen-VL
QWEN = {"image_token_id": IMAGE, "vision_start_token_id": START, "video_token_id": 92, "vision_end_token_id": 93}
MODELS = {"llava": {"image_token_id": IMAGE}, "qwen2_vl": QWEN, "qwen2_5_vl": QWEN}


@pytest.fixture(params=MODELS)
def family(request):
    return request.param


@pytest.fixture
def model(family):
    made = make_tiny(family, "AutoModelForImageTextToText", **MODELS[family])
    made.generation_config.eos_token_id = None
    return made


@pytest.fixture
def batch(family, model):
    """Two rows of text with a picture in each, which begins in the second segment."""
    ids = torch.randint(1, 89, (2, 45))
    if family == "llava":
        ids[:, 10:26] = IMAGE
        return {"input_ids": ids, "pixel_values": torch.randn(2, 3, 16, 16)}
    ids[:, 9], ids[:, 10:14] = START, IMAGE
    size = model.config.vision_config.patch_size
    grid = torch.tensor([[1, 4, 4], [1, 4, 4]])
    pixels = torch.randn(32, 3 * 2 * size**2)
    return {"input_ids": ids, "pixel_values": pixels, "image_grid_thw": grid, "mm_token_type_ids": (ids == IMAGE).int()}


@torch.no_grad()
def logits(model, batch, **kwargs):
    return model(**batch, **kwargs).logits


def generate(model, batch, **kwargs):
    mask = torch.ones_like(batch["input_ids"])
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
    return model.generate(**{"attention_mask": mask, **batch, **options, **kwargs})


def naive(module, query, key, value, attention_mask, scaling=None, **kwargs):
    settings = {"overlap": "once", "num_sink_tokens": 4, "local": "sliding", "scale": scaling}
    return dilated_attention_reference(query, key, value, *SCHEDULE, **settings).transpose(1, 2).contiguous(), None


AttentionInterface.register("naive_of_composites", naive)
AttentionMaskInterface.register("naive_of_composites", lambda **kwargs: None)


def test_the_text_part_alone_is_patched(family, model):
    part = text_part(model)
    patch_model(model, *SCHEDULE)
    assert part is model.model.language_model and is_patched(model) and is_patched(part)
    assert report(model) is model.dilated_attention_report and report(model).family == family
    assert report(model).layers == (0, 1) and report(model).unbounded is None
    assert model.config.text_config.dilated_attention["segment_lengths"] == [8, 32]
    assert not hasattr(model.config, "dilated_attention") and set(TAGS) <= set(model.model_tags)
    assert not text_part(model).config.to_dict().keys() & {"auto_map"}
    modules = [module for module in model.modules() if hasattr(module, "config")]
    patched = {type(module).__name__ for module in modules if hasattr(module.config, "dilated_attention")}
    assert patched and not any("Vision" in name or "CLIP" in name for name in patched)


def test_with_a_picture_patched_is_original_on_short_input_and_the_definition_on_long(model, batch):
    plain = copy.deepcopy(model)
    torch.testing.assert_close(
        logits(patch_model(copy.deepcopy(model), [64, 128], [1, 2]), batch), logits(plain, batch), **CLOSE
    )
    text_part(plain).set_attn_implementation("naive_of_composites")
    patch_model(model, *SCHEDULE)
    torch.testing.assert_close(logits(model, batch), logits(plain, batch), **CLOSE)


def test_generate_takes_the_bounded_cache_and_gives_the_tokens_without_one(model, batch):
    patch_model(model, *SCHEDULE)
    found, wanted = generate(model, batch), generate(model, batch, use_cache=False)
    assert isinstance(found[CACHE], DilatedCache)
    assert torch.equal(found.sequences, wanted.sequences)
    plain = generate(model, batch, **named_cache(DynamicCache(config=model.config)))
    assert type(plain[CACHE]) is DynamicCache and torch.equal(plain.sequences, wanted.sequences)


def test_saved_loaded_and_unpatched(model, batch, tmp_path):
    before, keys = logits(model, batch), set(vars(model))
    original = model.config.to_dict()
    expected = logits(patch_model(model, *SCHEDULE), batch)
    model.save_pretrained(tmp_path)
    loaded = load_patched_model(tmp_path)
    assert type(loaded) is type(model) and report(loaded) == report(model)
    assert torch.equal(logits(loaded, batch), expected)
    assert isinstance(generate(loaded, batch)[CACHE], DilatedCache)
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert not is_patched(plain) and torch.equal(logits(plain, batch), before)
    unpatch_model(model)
    assert not is_patched(model) and torch.equal(logits(model, batch), before) and set(vars(model)) == keys
    written = {"architectures", "dtype", "text_config", "vision_config"}  # by save_pretrained
    assert {k: v for k, v in model.config.to_dict().items() if k not in written} == {
        k: v for k, v in original.items() if k not in written
    }
    assert "dilated_attention" not in model.config.to_dict()["text_config"]
    assert type(generate(model, batch)[CACHE]) is DynamicCache


def test_left_padding_is_not_seen(model, batch, family):
    if family != "llava":
        pytest.skip("Qwen-VL's own positions of text and picture want padding told to its processor")
    patch_model(model, *SCHEDULE)
    row = {"input_ids": batch["input_ids"][1:], "pixel_values": batch["pixel_values"][1:]}
    ids = torch.cat([torch.zeros(1, 7, dtype=torch.long), row["input_ids"]], 1)
    mask = torch.ones_like(ids)
    mask[:, :7] = 0
    padded = generate(model, {**row, "input_ids": ids, "attention_mask": mask}).sequences[:, 7:]
    assert torch.equal(padded, generate(model, row).sequences)


def test_an_adapter_of_a_composite_model_brings_its_patch(model, batch, tmp_path):
    model.save_pretrained(tmp_path / "base")
    base = patch_model(AutoModelForImageTextToText.from_pretrained(tmp_path / "base"), *SCHEDULE)
    peft_model = get_peft_model(base, LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    expected = logits(peft_model, batch)
    peft_model.save_pretrained(tmp_path / "adapter")
    loaded = load_patched_model(tmp_path / "adapter").eval()
    assert is_patched(loaded)
    torch.testing.assert_close(logits(loaded, batch), expected, **CLOSE)


def test_a_composite_model_streams_text(model):
    patch_model(model, *SCHEDULE)
    tokens = torch.randint(1, 89, (90,))
    whole = logits(model, {"input_ids": tokens[None]})[0]
    wanted = torch.nn.functional.cross_entropy(whole[:-1], tokens[1:]).item()
    assert stream_loss(model, tokens, chunk_size=13, progress=False).loss == pytest.approx(wanted, abs=1e-5)


def test_the_card_tells_how_to_load_it(model):
    patch_model(model, *SCHEDULE)
    card = make_model_card(model, "user/model")
    assert 'load_patched_model("user/model")' in card.text and "2 of its 2 layers" in card.text
    assert card.data.pipeline_tag == "image-text-to-text"


def test_what_is_not_done_is_refused_by_name(model, tmp_path):
    patch_model(model, *SCHEDULE)
    name = type(model).__name__
    with pytest.raises(ValueError, match=f"got {name}, a composite one.*load_patched_model"):
        export_patched_model(model, tmp_path / "export")
    with pytest.raises(ValueError, match="composite model"):
        SequenceParallel(None, 1).add_hooks(model)
    with pytest.raises(ValueError, match=f"was patched as a part of {name}"):
        unpatch_model(model.model.language_model)
    with pytest.raises(ValueError, match=f"{name} is patched already"):
        patch_model(model, *SCHEDULE)
    with pytest.raises(ValueError, match="attn_implementation"):
        model.set_attn_implementation("eager")


def test_a_part_that_was_patched_by_itself_is_unpatched_from_the_whole(model, batch):
    before = logits(model, batch)
    patch_model(model.model.language_model, *SCHEDULE)
    assert is_patched(model) and report(model).layers == (0, 1)
    assert torch.equal(logits(unpatch_model(model), batch), before)


def test_pictures_that_see_themselves_whole_are_refused():
    model = patch_model(make_tiny("gemma3", "AutoModelForImageTextToText"), [8, 32], [1, 4], layers=[1])
    ids = torch.randint(1, 89, (1, 20))
    logits(model, {"input_ids": ids})
    kinds = torch.zeros_like(ids)
    kinds[:, 5:9] = 1
    with pytest.raises(ValueError, match="adds its own function to the causal mask|lets tokens see later ones"):
        logits(model, {"input_ids": ids, "token_type_ids": kinds})


def test_a_text_part_that_is_not_causal_is_refused():
    model = make_tiny("paligemma", "AutoModelForImageTextToText")
    with pytest.raises(ValueError, match=r"PaliGemmaForConditionalGeneration \(paligemma\).* it is not causal"):
        patch_model(model, *SCHEDULE)
    assert not is_patched(model)
