"""Padding between a row's tokens: a prompt-tuned batch, a padded continuation of a shared prefix, right-padded prompts.

The laws: on texts of up to w_0 tokens a patched model is the original, whatever the mask; and with positions that count
the tokens alone, each row is read as it would be without its padding.
"""

import copy

import pytest
import torch
from torch.testing import assert_close
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from modeling_longnet import DilatedCache, patch_model
from modeling_longnet.sequence_parallel import SequenceParallel
from modeling_longnet.transformers_compat import named_cache


SIZES = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.3, "bos_token_id": None,
    "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
PATCHES = {
    "all layers": {"segment_lengths": [8, 32], "dilation_rates": [1, 4], "overlap": "count"},
    "one left dense": {"segment_lengths": [8, 32], "dilation_rates": [1, 4], "layers": [0, 2]},
    "dense": {"segment_lengths": [64], "dilation_rates": [1]},
}
MASKS = {
    "virtual tokens before left padding": [(5, 0, 20), (5, 13, 7), (5, 19, 1)],
    "padding between and behind": [(9, 6, 10), (1, 1, 23), (25, 0, 0)],
    "right padding": [(25, 0, 0), (11, 14, 0), (1, 24, 0)],
    "left padding": [(0, 9, 16), (0, 0, 25), (0, 24, 1)],
}  # fmt: skip
every_patch = pytest.mark.parametrize("patch", PATCHES.values(), ids=PATCHES)
every_mask = pytest.mark.parametrize("runs", MASKS.values(), ids=MASKS)


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).double().eval()


def mask_of(runs) -> torch.Tensor:
    """Rows of real tokens, then padding, then real tokens, then padding up to 25."""
    rows = [torch.tensor([1] * a + [0] * b + [1] * c + [0] * (25 - a - b - c)) for a, b, c in runs]
    return torch.stack(rows)


def counted(mask: torch.Tensor) -> torch.Tensor:
    return (mask.cumsum(1) - 1).clamp(min=0)


@every_mask
@pytest.mark.parametrize("positions", [False, True])
@torch.no_grad()
def test_within_the_first_segment_it_is_the_original(runs, positions):
    model, x, mask = llama(), torch.randint(1, 61, (3, 25)), mask_of(runs)
    inputs = {"input_ids": x, "attention_mask": mask} | ({"position_ids": counted(mask)} if positions else {})
    wanted = model(**inputs).logits[mask.bool()]
    patch_model(model, **PATCHES["dense"])
    assert_close(model(**inputs).logits[mask.bool()], wanted)
    for cache in (DynamicCache(config=model.config), DilatedCache(model.config)):
        assert_close(model(**inputs, **named_cache(cache)).logits[mask.bool()], wanted)


@every_patch
@every_mask
@torch.no_grad()
def test_each_row_is_read_as_alone_and_goes_on_as_alone(runs, patch):
    model, mask = patch_model(llama(), **patch), mask_of(runs)
    x, new = torch.randint(1, 61, (3, 25)), torch.randint(1, 61, (3, 4))
    whole = torch.cat([mask, torch.ones(3, 4, dtype=torch.long)], dim=1)
    caches = [DynamicCache(config=model.config), DilatedCache(model.config)]
    caches.append(StaticCache(config=model.config, max_cache_len=40) if all(c == 0 for *_, c in runs) else None)
    alone = [
        model(input_ids=torch.cat([row[kept.bool()], after])[None]).logits[0]
        for row, kept, after in zip(x, mask, new)
    ]
    for cache in filter(None, caches):
        found = model(input_ids=x, attention_mask=mask, position_ids=counted(mask), **named_cache(cache)).logits
        steps = []
        for end in range(26, 30):
            step = {"attention_mask": whole[:, :end], "position_ids": counted(whole[:, :end])[:, -1:]}
            steps.append(model(input_ids=new[:, end - 26 : end - 25], **step, **named_cache(cache)).logits)
        steps = torch.cat(steps, dim=1)
        for row, wanted in enumerate(alone):
            assert_close(torch.cat([found[row][mask[row].bool()], steps[row]]), wanted)


@every_patch
@pytest.mark.parametrize("kind", [DynamicCache, DilatedCache])
@torch.no_grad()
def test_a_shared_prefix_goes_on_with_left_padded_rows(kind, patch):
    model = patch_model(llama(), **patch)
    prefix, x = torch.randint(1, 61, (1, 12)), torch.randint(1, 61, (2, 20))
    mask = torch.ones(2, 32, dtype=torch.long)
    mask[1, 12:19] = 0
    cache = kind(config=model.config)
    model(input_ids=prefix.expand(2, -1), use_cache=True, **named_cache(cache))
    inputs = {"attention_mask": mask, "position_ids": counted(mask)[:, 12:]}
    found = model(input_ids=x, **inputs, **named_cache(copy.deepcopy(cache))).logits
    alone = torch.cat([prefix, x[1:, 7:]], dim=1)
    assert_close(found[1, 7:], model(input_ids=alone).logits[0, 12:])
    assert_close(found[0], model(input_ids=torch.cat([prefix, x[:1]], dim=1)).logits[0, 12:])
    generated = model.generate(
        torch.cat([prefix.expand(2, -1), x], dim=1), attention_mask=mask, max_new_tokens=6, do_sample=False,
        **named_cache(cache),
    )  # fmt: skip
    assert torch.equal(generated[1, -6:], model.generate(alone, max_new_tokens=6, do_sample=False)[0, -6:])


@every_patch
def test_gradients_are_those_of_each_row_alone(patch):
    model, mask = patch_model(llama(), **patch), mask_of(MASKS["virtual tokens before left padding"])
    embeds = torch.randn(3, 25, 32, dtype=torch.float64, requires_grad=True)
    out = model(inputs_embeds=embeds, attention_mask=mask, position_ids=counted(mask)).logits
    weight = torch.randn_like(out) * mask[..., None]
    found = torch.autograd.grad((out * weight).sum(), embeds)[0]
    for row, kept in enumerate(mask.bool()):
        alone = model(inputs_embeds=embeds[row : row + 1, kept]).logits
        wanted = torch.autograd.grad((alone * weight[row, kept]).sum(), embeds)[0]
        assert_close(found[row], wanted[row])


def test_a_prompt_tuned_batch_may_be_padded_on_either_side():
    peft = pytest.importorskip("peft")
    original = llama()
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    x, mask = torch.randint(1, 61, (2, 20)), torch.ones(2, 20, dtype=torch.long)
    mask[1, :7] = 0
    for side in (mask, mask.flip(1)):
        tuned = peft.get_peft_model(copy.deepcopy(original), config).eval()
        patched = copy.deepcopy(tuned)
        patch_model(patched, **PATCHES["dense"])
        with torch.no_grad():
            kept = torch.cat([torch.ones(2, 5, dtype=torch.long), side], dim=1).bool()
            found, wanted = (model(input_ids=x, attention_mask=side).logits[kept] for model in (patched, tuned))
        assert_close(found, wanted)


def test_what_cannot_be_put_side_by_side_says_what_can():
    model, x = patch_model(llama(), **PATCHES["all layers"]), torch.randint(1, 61, (2, 20))
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[1, 15:] = 0
    mask[1, 2:4] = 0
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=x[:, :10], attention_mask=mask[:, :10], **named_cache(cache))
        with pytest.raises(ValueError, match="Pad these tokens on the left"):
            model(input_ids=x[:, 10:], attention_mask=mask, **named_cache(cache))
    sp = SequenceParallel(None, 1)
    sp.add_hooks(model)
    with pytest.raises(ValueError, match="between the tokens"):
        model(**sp.collator(lambda batch: batch)({"input_ids": x, "attention_mask": mask, "labels": x.clone()}))


@torch.no_grad()
def test_compiled_it_is_an_error_and_no_wrong_number():
    model, x = patch_model(llama(), **PATCHES["all layers"]), torch.randint(1, 61, (3, 25))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    mask = mask_of(MASKS["left padding"])
    wanted = model(input_ids=x, attention_mask=mask).logits
    assert_close(compiled(input_ids=x, attention_mask=mask).logits[mask.bool()], wanted[mask.bool()])
    with pytest.raises(RuntimeError, match="padding between real tokens"):
        compiled(input_ids=x, attention_mask=mask_of(MASKS["padding between and behind"]))
