"""The documents: their links lead somewhere, their code runs, their reference names what there is."""

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

import modeling_longnet
from modeling_longnet import streaming


ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
WITH_CODE = ("choosing_a_schedule.md", "patching.md", "streaming.md")


def _without_code(text: str) -> str:
    return re.sub(r"`[^`\n]*`", "", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


def _anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _broken_links(path: Path) -> list[str]:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", _without_code(path.read_text())):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = path.parent / name if name else path
        if not file.exists() or (anchor and anchor not in _anchors(file)):
            broken.append(target)
    return broken


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    assert not _broken_links(path)


def test_a_broken_link_is_found(tmp_path):
    (tmp_path / "a.md").write_text("# One thing\n[right](#one-thing) [wrong](#another) [gone](b.md) `[code](c.md)`\n")
    assert _broken_links(tmp_path / "a.md") == ["#another", "b.md"]


@pytest.fixture
def tiny_checkpoint(tmp_path, monkeypatch):
    """The checkpoint that the documents name, as one of random weights in a folder of that name."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    tokenizer = ByT5Tokenizer(extra_ids=0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=36, intermediate_size=32, num_hidden_layers=2, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    name = "HuggingFaceTB/SmolLM2-135M-Instruct"
    LlamaForCausalLM(config).save_pretrained(name)
    tokenizer.save_pretrained(name)
    # ByT5 cannot be found by the model's type, as a checkpoint's own tokenizer is.
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_: tokenizer)
    return AutoModelForCausalLM.from_pretrained(name)


@pytest.mark.filterwarnings("ignore:`rope_type` is set:UserWarning")
@pytest.mark.parametrize("name", WITH_CODE)
def test_code_of_the_guides_runs(name, tiny_checkpoint, monkeypatch):
    text = (ROOT / "docs" / name).read_text()
    if "cache=cache" in text and modeling_longnet.transformers_compat.CACHE != "cache":
        text = text.replace("cache=cache", f"{modeling_longnet.transformers_compat.CACHE}=cache")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert blocks
    names = {}
    for block in blocks:
        exec(compile(block, name, "exec"), names)
    if name == "streaming.md":
        prompt = names["prompt"]["input_ids"]
        assert names["text"].shape[1] <= prompt.shape[1] + 8 and names["result"].tokens == prompt.shape[1]
        assert names["cache"].get_seq_length() == prompt.shape[1]
        whole = names["model"](input_ids=prompt, use_cache=False).logits[:, -1]
        torch.testing.assert_close(names["output"].logits[:, -1], whole, rtol=1e-4, atol=1e-4)


def test_what_suggest_schedule_is_said_to_print(tiny_checkpoint):
    text = (ROOT / "docs/choosing_a_schedule.md").read_text()
    printed = re.search(r"For SmolLM2 it prints\n\n```\n(.*?)\n```", text, re.DOTALL)[1]
    assert str(modeling_longnet.suggest_schedule(tiny_checkpoint, context=32768, budget=1024)) == printed


def test_the_reference_has_every_public_name():
    entries = set(re.findall(r"^::: (\S+)$", (ROOT / "docs/api.md").read_text(), re.MULTILINE))
    public = {f"modeling_longnet.{name}" for name in modeling_longnet.__all__ if not name.startswith("__")}
    assert public - entries <= {"modeling_longnet.LongNetPreTrainedModel", "modeling_longnet.DilatedCacheLayer"}
    assert "modeling_longnet.streaming.stream_loss" in entries and hasattr(streaming, "stream_loss")
