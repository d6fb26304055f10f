"""Each family of the library is right or refused by name; docs/compatibility.md has the table of all.

The whole sweep takes minutes: `FAMILY_SWEEP=all python -m pytest tests/test_family_sweep.py`, or the command in
tests/family_sweep.py, which writes the table.
"""

import os
import re
from dataclasses import replace
from pathlib import Path

import family_sweep
import pytest
import torch
from tiny_families import make_tiny

from modeling_longnet import dilated_cache_generation, patch_attention
from modeling_longnet.patching import is_patched, patch_model, report
from modeling_longnet.transformers_compat import release


DOCUMENT = (Path(__file__).parents[1] / "docs/compatibility.md").read_text()
FAMILIES = family_sweep.families()
# Of each kind one: what `make test` can afford.
SAMPLE = (
    "llama", "gptj", "bert", "beam", "gemma3n_text", "llama4_text", "jetmoe", "minimax", "zaya", "doge", "hy_v4",
    "whisper", "bart", "zamba2", "falcon", "gpt_oss", "deepseek_v3", "git", "inkling2_text", "idefics3", "glm4v_moe",
    "unlimited_ocr", "paligemma", "llama4",
)  # fmt: skip
ASKED_FOR = pytest.mark.skipif(os.environ.get("FAMILY_SWEEP") != "all", reason="FAMILY_SWEEP=all runs it")
REFUSED = {
    "doge": "DogeForCausalLM .*its forward of two tokens with dilated attention fails",
    "zamba2": "Zamba2ForCausalLM .*its Zamba2Attention has the `layer_idx` -1",
    "bart": "BartForCausalLM .*lets tokens see later ones",
    "falcon": "FalconForCausalLM .*AttentionInterface",
    "hy_v4": "HYV4ForCausalLM .*its forward of two tokens with dilated attention fails",
    "inkling2_text": "Inkling2ForCausalLM .*(has the `layer_idx` None|.*attention sinks)",
    "git": "GitForCausalLM .*its forward of two tokens with dilated attention fails",
}


@pytest.mark.parametrize(
    "family",
    [
        name if name in SAMPLE else pytest.param(name, marks=[pytest.mark.slow, ASKED_FOR])
        for name in sorted(FAMILIES)
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_a_family_is_right_or_refused(family):
    verdict, text = family_sweep.judge(family)
    if verdict == "not built":
        pytest.skip(text[:200])
    assert verdict in ("right", "refused"), text


@pytest.mark.parametrize("family", [name for name in REFUSED if name in FAMILIES])
def test_what_a_patch_cannot_follow_is_refused_by_name(family):
    model = make_tiny(family)
    with pytest.raises(ValueError, match=REFUSED[family]):
        patch_model(model, *family_sweep.SCHEDULE)
    assert not is_patched(model) and "dilated_attention_report" not in vars(model)


@pytest.mark.parametrize(
    "family, why",
    [("jetmoe", "layer 0 changes the keys"), ("minimax", "cache of its own"), ("zaya", "recurrent states")],
)
def test_a_family_without_a_bounded_cache_says_so_and_generates(family, why, monkeypatch):
    if family not in FAMILIES:
        pytest.skip(f"not in Transformers {release()}")
    model = patch_model(make_tiny(family), *family_sweep.SCHEDULE)
    assert why in report(model).unbounded and why in str(report(model))
    prompt = torch.randint(2, 97, (1, 12))
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    said = []
    monkeypatch.setattr(dilated_cache_generation.logger, "warning_once", said.append)
    model.generate(prompt, **options)
    assert [text for text in said if f"`generate` takes {type(model).__name__}'s own cache, which grows" in text]


def test_a_fault_would_be_found(monkeypatch):
    """The judge itself, on a family whose patched attention forgets the sinks, and on one that dies unrefused."""
    assert family_sweep.judge("llama")[0] == "right"
    real = patch_attention.scheduled_attention

    def without_sinks(query, key, value, schedule, **kwargs):
        return real(query, key, value, replace(schedule, num_sink_tokens=0), **kwargs)

    monkeypatch.setattr(patch_attention, "scheduled_attention", without_sinks)
    verdict, text = family_sweep.judge("llama")
    assert verdict == "fault" and text.startswith("long_input_as_defined")
    monkeypatch.setattr(family_sweep, "patch_model", lambda *args: 1 / 0)
    assert family_sweep.judge("llama") == ("fault", "patch_model: ZeroDivisionError: division by zero")


def test_the_table_of_the_document_is_of_this_command_and_has_no_fault():
    assert family_sweep.BEGIN in DOCUMENT and family_sweep.END in DOCUMENT
    section = DOCUMENT.partition(family_sweep.BEGIN)[2].partition(family_sweep.END)[0]
    told = re.search(r"(\d+) right, (\d+) refused, (\d+) faults; (\d+) could not be made tiny", section)
    right, refused, faults, missing = map(int, told.groups())
    assert faults == 0 and right > 100 and refused > 40 and "| fault" not in section
    rows = re.findall(r"^\| (right|refused)[^|]*\| ([^|]+) \|$", section, re.MULTILINE)
    for state, count in (("right", right), ("refused", refused)):
        assert sum(len(names.split(", ")) for kind, names in rows if kind == state) == count
