"""The demo's passkeys: each form is asked, and the model is as before."""

from test_evidence import byte_model  # noqa: F401  a fixture
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples import finding
from modeling_longnet.patching import is_patched


def test_every_form_is_asked_at_every_depth(byte_model, monkeypatch):  # noqa: F811
    model, tokenizer = AutoModelForCausalLM.from_pretrained(byte_model), AutoTokenizer.from_pretrained(byte_model)
    before, forms = model.config.to_dict(), []

    def said(model, cache, question, tokenizer):
        """As if a model with a memory found, and one with a patch alone did not."""
        config = getattr(model.config, "dilated_attention", None)
        forms.append("dense" if config is None else "memory" if "memory" in config else "patched")
        return question.answers[0] if forms[-1] != "patched" else "no"

    monkeypatch.setattr(finding, "ask", said)
    settings = {"segment_lengths": [64, 256], "dilation_rates": [1, 4]}
    found = finding.find_passkeys(model, tokenizer, "a long text " * 99, settings, length=700)
    assert forms == ["dense"] * 5 + ["patched"] * 5 + ["memory"] * 5
    assert [sum(x) for x in found["found"].values()] == [5, 0, 5] and found["heads"] == 1
    assert not is_patched(model) and model.config.to_dict() == before
    assert "5 of 5 (1 heads)" in finding.in_words(found) and "0 of 5\n" in finding.in_words(found)
