"""Careless and hostile inputs, each of them by name: a clear error, or the right answer. Letters: B batch, N tokens."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_config
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM

from modeling_longnet import LongNetConfig, LongNetForCausalLM, dilated_attention
from modeling_longnet.dilated_cache import DilatedCache
from modeling_longnet.patching import load_patched_model, patch_model
from modeling_longnet.transformers_compat import named_cache


B, N = 2, 40


class Scene:
    """A model, two rows of tokens and a folder, and what careless people do with them."""

    def __init__(self, folder: Path):
        self.folder, self.model = folder, self.other()
        self.ids = torch.randint(1, 61, (B, N))

    @staticmethod
    def other(**changes) -> LongNetForCausalLM:
        return LongNetForCausalLM(tiny_config(position_embedding_type="rope", **changes)).eval()

    @torch.no_grad()
    def logits(self, *args, model=None, **kwargs) -> torch.Tensor:
        return (model or self.model)(*args, **kwargs).logits

    def load(self, spoil=lambda folder: None, **kwargs):
        self.model.save_pretrained(self.folder, max_shard_size="20KB")
        spoil(self.folder)
        return LongNetForCausalLM.from_pretrained(self.folder, **kwargs)

    def filled_cache(self, model=None) -> DilatedCache:
        cache = DilatedCache((model or self.model).config)
        self.logits(self.ids, **named_cache(cache), model=model)
        return cache

    def same(self, found: torch.Tensor, expected: torch.Tensor) -> None:
        assert_close(found, expected, rtol=1e-5, atol=1e-5)


def second_shard(folder: Path) -> Path:
    return sorted(folder.glob("model-*.safetensors"))[1]


def cut_short(folder: Path):
    path = second_shard(folder)
    path.write_bytes(path.read_bytes()[:-100])


def change_config(**changes):
    def spoil(folder: Path):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return spoil


# Each: (error, what its message tells, what was done).
REFUSED = {
    "a misspelt field of the configuration": (
        ValueError, "`segment_length`.*Did you mean `segment_lengths`", lambda s: LongNetConfig(segment_length=[8])),
    "a field of the wrong type": (Exception, "hidden_size.*expected int", lambda s: LongNetConfig(hidden_size=32.5)),
    "a text where numbers belong": (Exception, "segment_lengths", lambda s: LongNetConfig(segment_lengths="2048")),
    "lengths and rates of different number": (
        ValueError, "same number of entries, got 2 and 1",
        lambda s: LongNetConfig(segment_lengths=[8, 16], dilation_rates=[1])),
    "an unknown kind of positions": (ValueError, "'alibi'", lambda s: LongNetConfig(position_embedding_type="alibi")),
    "token ids beyond the vocabulary": (IndexError, "out of range", lambda s: s.logits(torch.tensor([[5, 61]]))),
    "no count of logits": (
        ValueError, "`logits_to_keep`.*got None", lambda s: s.logits(s.ids, logits_to_keep=None)),
    "a negative count of logits": (
        ValueError, "`logits_to_keep`.*got -1", lambda s: s.logits(s.ids, logits_to_keep=-1)),
    "a mask that is no tensor": (
        ValueError, "`attention_mask` must be a tensor", lambda s: s.logits(s.ids, attention_mask=np.ones((B, N)))),
    "positions that are no tensor": (
        ValueError, "`position_ids` must be a tensor", lambda s: s.logits(s.ids, position_ids={})),
    "negative token ids": (IndexError, "out of range", lambda s: s.logits(torch.tensor([[5, -1]]))),
    "token ids that are no integers": (RuntimeError, "Long, Int", lambda s: s.logits(s.ids.float())),
    "a row without its batch": (ValueError, r"`input_ids` must be a batch.*\(40,\)", lambda s: s.logits(s.ids[0])),
    "an empty batch": (ValueError, r"`input_ids`.*at least one token.*\(0, 40\)", lambda s: s.logits(s.ids[:0])),
    "a text of no tokens": (ValueError, r"`input_ids`.*\(2, 0\)", lambda s: s.logits(s.ids[:, :0])),
    "generating from no tokens": (ValueError, r"`input_ids`.*\(2, 0\)", lambda s: s.model.generate(s.ids[:, :0])),
    "no input at all": (ValueError, "exactly one of input_ids or inputs_embeds", lambda s: s.model()),
    "a mask that is too short": (
        ValueError, r"`attention_mask`.*\(2, 40\).*\(2, 30\)",
        lambda s: s.logits(s.ids, attention_mask=torch.ones(B, 30))),
    "a mask of another batch": (
        ValueError, r"`attention_mask`.*\(1, 40\)", lambda s: s.logits(s.ids, attention_mask=torch.ones(1, N))),
    "a mask of pairs": (
        ValueError, "`attention_mask` of pairs.*additive",
        lambda s: s.logits(s.ids, attention_mask=torch.ones(B, 1, N, N))),
    "an additive mask": (
        ValueError, "`attention_mask`.*additive",
        lambda s: s.logits(s.ids, attention_mask=torch.zeros(B, N).index_fill(1, torch.tensor([0]), -torch.inf))),
    "a mask of NaN": (
        ValueError, "`attention_mask`", lambda s: s.logits(s.ids, attention_mask=torch.full((B, N), torch.nan))),
    "positions of another length": (
        ValueError, r"`position_ids`.*\(2, 40\).*\(1, 39\)",
        lambda s: s.logits(s.ids, position_ids=torch.arange(39)[None])),
    "packing told to other attention functions only": (
        ValueError, "`cu_seq_lens_q` must come with `position_ids`",
        lambda s: s.logits(s.ids, cu_seq_lens_q=torch.tensor([0, 15, 40]))),
    "positions beyond a learned table": (
        ValueError, "`max_position_embeddings=32`",
        lambda s: s.logits(s.ids, model=LongNetForCausalLM(
            tiny_config(position_embedding_type="learned", max_position_embeddings=32)))),
    "labels of another length": (ValueError, "batch_size", lambda s: s.model(s.ids, labels=s.ids[:, :30])),
    "labels beyond the vocabulary": (IndexError, "out of bounds", lambda s: s.model(s.ids, labels=s.ids * 0 + 99)),
    "sampling with NaN weights": (
        RuntimeError, "nan", lambda s: (s.model.lm_head.weight.data.fill_(torch.nan), s.model.generate(
            s.ids, do_sample=True, max_new_tokens=2, pad_token_id=0))),
    "a cache of a model with another schedule": (
        ValueError, "`cache` was made for another model", lambda s: s.logits(
            s.ids[:, :3], **named_cache(s.filled_cache(s.other(segment_lengths=[4, 16], dilation_rates=[1, 2]))))),
    "a cache of a deeper model": (
        ValueError, r"layers \[0, 1, 2\]",
        lambda s: s.logits(s.ids, **named_cache(DilatedCache(s.other(num_hidden_layers=3).config)))),
    "a cache of another batch": (
        ValueError, "holds 2 rows", lambda s: s.logits(s.ids[:1, :3], **named_cache(s.filled_cache()))),
    "a cache for a model that has no dilated attention": (
        ValueError, "patched model", lambda s: DilatedCache(LlamaConfig())),
    "a patch that a model cannot take": (
        ValueError, "own", lambda s: patch_model(s.model, segment_lengths=[8], dilation_rates=[1])),
    "a folder with half a file": (Exception, "(?i)incomplete|header|buffer", lambda s: s.load(cut_short)),
    "a folder without one of its files": (
        OSError, "00002-of", lambda s: s.load(lambda folder: second_shard(folder).unlink())),
    "a folder of another size than its configuration": (
        RuntimeError, "mismatched", lambda s: s.load(change_config(intermediate_size=64))),
    "a configuration that is cut off": (
        OSError, "not a valid JSON", lambda s: s.load(lambda folder: (folder / "config.json").write_text("{"))),
    "a schedule from elsewhere that makes no sense": (
        ValueError, "`segment_lengths`", lambda s: s.load(change_config(segment_lengths=[-8, 16, 32]))),
    "patch settings that were tampered with": (
        ValueError, "settings", lambda s: load_tampered(s, {"segment_lengths": [8], "__class__": "os.system"})),
    "a dense attention": (
        (ValueError, ImportError), "flex", lambda s: s.load(attn_implementation="flex_attention")),
    "tensors of the wrong rank": (
        ValueError, "4 dimensions", lambda s: dilated_attention(*[s.ids.float()] * 3, [8], [1])),
    "tensors of different dtypes": (
        ValueError, "one floating point dtype",
        lambda s: dilated_attention(torch.zeros(1, 2, 8, 4), *[torch.zeros(1, 2, 8, 4).half()] * 2, [8], [1])),
}  # fmt: skip


def load_tampered(scene: Scene, settings: dict):
    config = LlamaConfig(vocab_size=61, hidden_size=32, intermediate_size=48, num_attention_heads=4,
                         num_hidden_layers=1)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(scene.folder)
    change_config(dilated_attention=settings)(scene.folder)
    return load_patched_model(scene.folder)


def rows_of_padding(s: Scene):
    """A row that is padding altogether disturbs no other, and gives finite numbers."""
    mask = torch.ones(B, N)
    mask[0] = 0
    found = s.logits(s.ids, attention_mask=mask)
    s.same(found[1:], s.logits(s.ids[1:]))
    assert found.isfinite().all()


def nan_in_one_row(s: Scene):
    """What is broken in one row of the batch shows there, and stays there."""
    embeddings = s.model.get_input_embeddings()(s.ids).detach()
    embeddings[0, 5] = torch.nan
    found = s.logits(inputs_embeds=embeddings)
    assert found[0, 5:8].isnan().all()
    s.same(found[1:], s.logits(s.ids[1:]))


def missing_weights_file_of_code(s: Scene):
    """Weights alone, without the code files, open where the package is."""
    s.model.save_pretrained(s.folder)
    for path in s.folder.glob("*.py"):
        path.unlink()
    s.same(s.logits(s.ids, model=AutoModelForCausalLM.from_pretrained(s.folder).eval()), s.logits(s.ids))


def tensors_nobody_asked_for(s: Scene):
    """A file with a tensor too many loads without it."""
    s.model.save_pretrained(s.folder)
    weights = load_file(s.folder / "model.safetensors")
    save_file(weights | {"model.backdoor": torch.ones(3)}, s.folder / "model.safetensors", {"format": "pt"})
    loaded = LongNetForCausalLM.from_pretrained(s.folder).eval()
    s.same(s.logits(s.ids, model=loaded), s.logits(s.ids))
    assert not hasattr(loaded.model, "backdoor")


ANSWERED = {
    "a row of nothing but padding": rows_of_padding,
    "NaN in one row": nan_in_one_row,
    "a folder without its code": missing_weights_file_of_code,
    "a file with foreign tensors": tensors_nobody_asked_for,
    "a mask of bool": lambda s: s.same(s.logits(s.ids, attention_mask=s.ids > 0), s.logits(s.ids)),
    "token ids of 32 bits": lambda s: s.same(s.logits(s.ids.int()), s.logits(s.ids)),
    "one token": lambda s: s.same(s.logits(s.ids[:, :1]), s.logits(s.ids)[:, :1]),
    "tensors that are not contiguous": lambda s: s.same(s.logits(s.ids.t().contiguous().t()), s.logits(s.ids)),
    "a plain cache in place of the bounded one": lambda s: s.same(
        s.logits(s.ids, **named_cache(DynamicCache(config=s.model.config))), s.logits(s.ids)
    ),
}
CASES = {**REFUSED, **ANSWERED}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore")
def test_hostile_input(name, tmp_path):
    scene = Scene(tmp_path)
    if name in ANSWERED:
        ANSWERED[name](scene)
        return
    error, message, act = REFUSED[name]
    with pytest.raises(error, match=message):
        act(scene)


def test_there_are_enough_of_them():
    assert len(CASES) >= 25
