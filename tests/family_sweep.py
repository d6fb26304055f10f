"""Judges `patch_model` on every causal language model of the installed Transformers that can be made tiny.

    python tests/family_sweep.py                                    # prints the table
    python tests/family_sweep.py --write docs/compatibility.md      # and puts it there, with releases and date
    python tests/family_sweep.py --only jetmoe doge                 # these, one a line

A family is *right* if every law of LAWS holds, or *refused* by a ValueError that leaves the model as it was. Anything
else is a *fault*, and the command ends with 1. A few minutes on one CPU core.
"""

import argparse
import copy
import datetime
import logging
import re
import sys
import tempfile
import warnings
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import transformers
from tiny_families import make_tiny
from tqdm import tqdm
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, PreTrainedModel

from modeling_longnet.dilated_attention_reference import dilated_attention_reference
from modeling_longnet.dilated_cache import DilatedCache
from modeling_longnet.patch_probe import text_part
from modeling_longnet.patching import is_patched, load_patched_model, patch_model, report, unpatch_model
from modeling_longnet.transformers_compat import (
    ALL_ATTENTION_FUNCTIONS,
    ALL_MASK_ATTENTION_FUNCTIONS,
    CACHE,
    attention_of,
    causal_lm_class_names,
    composite_families,
    head_of_composite,
)


SCHEDULE = ([8, 32], [1, 4])
TOLERANCE = {"atol": 2e-5, "rtol": 2e-5}
SHORT, PROMPT, LONG, PADDING = 8, 20, 45, 15  # tokens
BEGIN, END = "<!-- made by tests/family_sweep.py: begin -->\n", "<!-- made by tests/family_sweep.py: end -->\n"


@torch.no_grad()
def logits(model: PreTrainedModel, input_ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=input_ids, use_cache=False).logits


def generate(model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor, steps: int, **kwargs):
    return model.generate(
        input_ids, attention_mask=attention_mask, max_new_tokens=steps, min_new_tokens=steps, do_sample=False,
        pad_token_id=0, return_dict_in_generate=True, output_logits=True, **kwargs,
    )  # fmt: skip


def register_naive_attention(layers: tuple[int, ...], original: str) -> None:
    """An attention 'naive': in these layers the shipped definition, in the others what they run anyway."""

    def naive(module, query, key, value, attention_mask, scaling=None, **kwargs):
        if module.layer_idx not in layers:
            function = ALL_ATTENTION_FUNCTIONS[original]
            return function(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        settings = {"overlap": "once", "num_sink_tokens": 4, "local": "sliding", "scale": scaling}
        out = dilated_attention_reference(query, key, value, *SCHEDULE, **settings)
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register("naive", naive)
    AttentionMaskInterface.register("naive", ALL_MASK_ATTENTION_FUNCTIONS[original])


# The laws. Each takes the original model, the patched one and tokens [2, LONG].


def short_input_as_before(plain, patched, ids):
    torch.testing.assert_close(logits(patched, ids[:, :SHORT]), logits(plain, ids[:, :SHORT]), **TOLERANCE)


def long_input_as_defined(plain, patched, ids):
    original = attention_of(text_part(plain).config)
    if original == "eager":  # its function stands in the model's file, out of the interface's reach
        return
    register_naive_attention(report(patched).layers, original)
    naive = copy.deepcopy(plain)
    text_part(naive).set_attn_implementation("naive")
    torch.testing.assert_close(logits(patched, ids), logits(naive, ids), **TOLERANCE)


def generates_as_without_cache(plain, patched, ids):
    mask, prompt = torch.ones(2, PROMPT, dtype=torch.long), ids[:, :PROMPT]

    def difference(model):
        found = generate(model, prompt, mask, LONG - PROMPT)
        wanted = generate(model, prompt, mask, LONG - PROMPT, use_cache=False)
        return (torch.stack(found.logits) - torch.stack(wanted.logits)).abs().max().item(), found

    allowed = max(5e-5, 3 * difference(plain)[0])  # recurrent layers round otherwise step by step
    differs, found = difference(patched)
    assert differs <= allowed, f"differs by {differs:.1e}, unpatched by {allowed / 3:.1e}"
    if report(patched).unbounded is None:
        assert isinstance(found[CACHE], DilatedCache), f"generate took a {type(found[CACHE]).__name__}"


def left_padding_is_not_seen(plain, patched, ids):
    mask = torch.ones_like(ids)
    mask[1, :PADDING] = 0

    def difference(model, **kwargs):
        batch = torch.stack(generate(model, ids, mask, 4, **kwargs).logits, 1)[1]
        alone = torch.stack(generate(model, ids[1:, PADDING:], mask[1:, PADDING:], 4, **kwargs).logits, 1)[0]
        return (batch - alone).abs().max().item()

    allowed = max(5e-5, 2 * difference(plain))  # some families let padding through by themselves
    assert difference(patched) <= allowed, f"differs by {difference(patched)}, unpatched by {allowed / 2}"


def saving_and_loading_is_no_change(plain, patched, ids):
    if not _survives_a_file(plain, ids):
        return
    with tempfile.TemporaryDirectory() as folder:
        copy.deepcopy(patched).save_pretrained(folder)  # which writes into the configuration
        loaded = load_patched_model(folder)
    assert type(loaded) is type(patched)
    torch.testing.assert_close(logits(loaded.eval(), ids), logits(patched, ids), **TOLERANCE)


def _survives_a_file(plain, ids) -> bool:
    """Whether Transformers itself can save and load this model."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            copy.deepcopy(plain).save_pretrained(folder)
            auto = head_of_composite(folder, AutoModelForCausalLM)
            return torch.allclose(logits(auto.from_pretrained(folder), ids), logits(plain, ids), **TOLERANCE)
        except Exception:
            return False


def unpatching_restores(plain, patched, ids):
    assert torch.equal(logits(unpatch_model(patched), ids), logits(plain, ids))
    assert patched.config.to_dict() == plain.config.to_dict()
    assert set(vars(patched)) <= {*vars(plain), "model_tags"}


LAWS = (
    short_input_as_before, long_input_as_defined, generates_as_without_cache, left_padding_is_not_seen,
    saving_and_loading_is_no_change, unpatching_restores,
)  # fmt: skip


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:4])[:300]}"


def judge_model(model: PreTrainedModel, family: str) -> tuple[str, str]:
    """("right" | "refused" | "fault", what there is to say) of one model of random weights."""
    ids = torch.randint(2, 97, (2, LONG))
    plain, before = copy.deepcopy(model), logits(model, ids)
    try:
        patch_model(model, *SCHEDULE)
    except ValueError as error:
        after = logits(model, ids)
        if is_patched(model) or set(vars(model)) != set(vars(plain)) or not torch.equal(before, after):
            return "fault", f"refused, but the model is not as it was: {error}"
        if type(model).__name__ not in str(error):
            return "fault", f"refused without the model's name: {error}"
        return "refused", str(error)
    except Exception as error:
        return "fault", f"patch_model: {_first_line(error)}"
    told = [f"left alone, layers of which {reason}" for reason in sorted(set(report(model).left_alone.values()))]
    told += ["`generate` with the model's own cache, and a warning"] * (report(model).unbounded is not None)
    for law in LAWS:
        try:
            law(plain, model, ids)
        except Exception as error:
            return "fault", f"{law.__name__}: {_first_line(error)}"
    return "right", "; ".join(told)


def judge(model_type: str) -> tuple[str, str]:
    """The verdict on a family, as a composite model if it is one and else as a causal one, or ("not built", why)."""
    why = ""
    for auto_class in families()[model_type]:
        try:
            model = make_tiny(model_type, auto_class)
            model.generation_config.eos_token_id = None
            ones = torch.ones(2, 4, dtype=torch.long)
            generate(model, ones, ones, 2)
            logits(model, ones)
        except Exception as error:
            why = why or _first_line(error)
        else:
            return judge_model(model, model_type)
    return "not built", why


def families() -> dict[str, list[str]]:
    """Model type to names of Auto classes, of all composite and causal language models."""
    ours = vars(sys.modules["modeling_longnet"])
    found = {family: [name] for family, name in composite_families().items()}
    for family, name in causal_lm_class_names().items():
        if name not in ours:
            found.setdefault(family, []).append("AutoModelForCausalLM")
    return found


def kind_of(text: str) -> str:
    """A verdict without what is particular to one model, so that like families stand together."""
    text = re.sub(r"^\w+ \([\w.-]+\) ", "", re.sub(r"\(\d+ and \d+: ", "(", text))
    text = text.removeprefix("has no layer that can be dilated: ")
    text = re.sub(r"[,.;] (so it cannot be patched; )?[Ii]t was left as it (is|was)\.$", "", text)
    return text.strip().rstrip(".")


def table(verdicts: dict[str, tuple[str, str]]) -> str:
    groups: dict[tuple[str, str], list[str]] = {}
    for family, (state, text) in verdicts.items():
        groups.setdefault((state, kind_of(text)), []).append(family)
    order = ["right", "refused", "fault", "not built"]
    lines = ["| verdict | families |", "|---|---|"]
    for (state, text), members in sorted(groups.items(), key=lambda group: (order.index(group[0][0]), group[0][1])):
        if state != "not built":
            said = f"{state}{': ' if text else ''}{text}".replace("|", "/")
            lines.append(f"| {said} | {', '.join(sorted(members))} |")
    counts = {state: sum(found == state for found, _ in verdicts.values()) for state in order}
    missing = [family for family, (state, _) in verdicts.items() if state == "not built"]
    lines += ["", f"{counts['right']} right, {counts['refused']} refused, {counts['fault']} faults; "
              f"{counts['not built']} could not be made tiny: {', '.join(missing) or 'none'}."]  # fmt: skip
    return "\n".join(lines) + "\n"


def write(path: Path, text: str) -> None:
    document = path.read_text()
    if BEGIN not in document or END not in document:
        raise ValueError(f"`--write` wants a file with the lines {BEGIN.strip()} and {END.strip()}, got {path}.")
    releases = f"Transformers {transformers.__version__}, PyTorch {torch.__version__.partition('+')[0]}"
    today = f"{datetime.date.today():%d %B %Y}"
    head = f"({releases}, CPU, {today}; `python tests/family_sweep.py --write docs/{path.name}`)\n\n"
    path.write_text(document[: document.index(BEGIN)] + BEGIN + head + text + document[document.index(END) :])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", type=Path, help="a Markdown file with this script's two marks")
    parser.add_argument("--only", nargs="+", choices=sorted(families()), metavar="FAMILY")
    options = parser.parse_args(arguments)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    verdicts = {}
    for family in tqdm(options.only or sorted(families()), unit="family"):
        verdicts[family] = judge(family)
        if verdicts[family][0] == "fault" or options.only:
            tqdm.write(f"{family}: {': '.join(verdicts[family])}")
    print(table(verdicts))
    if options.write and not options.only:
        write(options.write, table(verdicts))
    return int(any(state == "fault" for state, _ in verdicts.values()))


if __name__ == "__main__":
    sys.exit(main())
