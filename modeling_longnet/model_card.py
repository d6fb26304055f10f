"""The model card of a LongNet or a patched model: its schedule as a table and as a picture, and how to load it."""

import json
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedModel

from .dilation_schedule import DilationSchedule
from .transformers_compat import COMPOSITE_CLASSES, auto_class_of, brings_its_code, text_config_of, upload


TAGS = ("longnet", "dilated-attention")
# What Transformers writes where a repository has no card yet.
AUTOMATIC_CARD = "This model card has been automatically generated."
PIPELINES = {"AutoModelForCausalLM": "text-generation", "AutoModelForImageTextToText": "image-text-to-text"}
LETTERS = "abcdefghijklmnopqrstuvwxyz"

TEXT = """
# {name}

{intro}

## Schedule

{table}

{options}

The longest segment ({length} tokens), cut into {cells} stretches of {cell} tokens: rows are queries, columns are keys.
A letter names the densest pattern in which tokens of the two stretches see each other{sinks}.

```text
{picture}
```

## How to load

```python
{example}
```

{loading}

{evaluation}## License and source

{license} The code files are licensed under Apache-2.0. Dilated attention is due to
[LongNet: Scaling Transformers to 1,000,000,000 Tokens](https://arxiv.org/abs/2307.02486).
"""

LOADING_LONGNET = """The repository holds the model's code, which `trust_remote_code=True` lets run (read it first).
With the package longnet-transformers installed, `import modeling_longnet` before loading replaces that."""

LOADING_PATCHED = """Loaded in any other way (a plain `from_pretrained`, a server with attention of its own), it is the
original model with dense attention. With the package longnet-transformers installed, `load_patched_model` of
`modeling_longnet.patching` loads it patched."""


def draw_schedule(schedule: DilationSchedule, cells: int = 32) -> str:
    r"""Who sees whom, in text: rows are queries, columns keys, a letter the densest pattern that joins two cells.

    For segments 8, 16, 32 at rates 1, 2, 4 over 8 cells of 4 tokens each:

        aa
        aaaa
        bbbbaa
        bbbbaaaa
        ccccccccaa
        ccccccccaaaa
        ccccccccbbbbaa
        ccccccccbbbbaaaa

    Letters stand twice, so that the picture is about square. "s" stands where only the sink tokens are seen.
    """
    length = schedule.segment_lengths[-1]
    cells = min(cells, length)

    def joins(pattern: int, first: int, later: int) -> bool:
        """Whether a pattern holds a token of cell `first` and one of cell `later` in one segment or window."""
        if first == later:
            return True
        last_token, next_token = length * (first + 1) // cells - 1, length * later // cells
        if pattern == 0 and schedule.window:
            return next_token - last_token < schedule.window or next_token < schedule.dense_start
        width = schedule.segment_lengths[pattern]
        return last_token // width == next_token // width

    def symbol(query: int, key: int) -> str:
        if schedule.is_causal and key > query:
            return " "
        for pattern in range(len(schedule.patterns)):
            if joins(pattern, min(query, key), max(query, key)):
                return LETTERS[pattern % len(LETTERS)]
        return "s" if key == 0 and schedule.num_sink_tokens else "."

    rows = ("".join(2 * symbol(query, key) for key in range(cells)).rstrip() for query in range(cells))
    return "\n".join(rows)


def _describe(schedule: DilationSchedule) -> tuple[str, str]:
    """The table of patterns, and the options in words."""
    lines = ["| pattern | segment length | dilation rate | keys per segment and head |", "|---|---|---|---|"]
    for index, (width, rate) in enumerate(schedule.patterns):
        name = LETTERS[index % len(LETTERS)]
        if index == 0 and schedule.window:
            lines.append(f"| {name} | sliding window of {schedule.window:,} | 1 | {schedule.window:,} |")
        else:
            lines.append(f"| {name} | {width:,} | {rate} | {-(-width // rate):,} |")
    options = (
        f"{'Causal' if schedule.is_causal else 'Bidirectional'}; head offsets: {schedule.head_offsets}; keys that "
        f"several patterns offer: {schedule.overlap}; sink tokens: {schedule.num_sink_tokens}; incomplete segments: "
        f"{schedule.padding}."
    )
    if schedule.memory is not None:
        options += f" Memory: `{json.dumps(schedule.memory.to_dict())}`."
    return "\n".join(lines), options


def _cost(schedule: DilationSchedule) -> str:
    memory = schedule.memory
    if memory is None or memory.only_layers == ():
        return "the cost grows in proportion to the text's length."
    where = "all" if memory.only_layers is None else len(memory.only_layers)
    return (
        f"in {where} of these a query also chooses {memory.top_k} of the blocks of {memory.block_size} earlier tokens, "
        "which are all kept and ranked."
    )


def _auto_class(model: PreTrainedModel) -> str:
    if text_config_of(model.config) is not model.config:
        return auto_class_of(model, COMPOSITE_CLASSES) or "AutoModel"
    for ending in ("ForCausalLM", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification",
                   "ForQuestionAnswering", "ForImageClassification"):  # fmt: skip
        if type(model).__name__.endswith(ending):
            return f"AutoModel{ending}"
    return "AutoModelForCausalLM" if type(model).__name__.endswith("LMHeadModel") else "AutoModel"


def _evaluation_section(results: Sequence[EvalResult]) -> str:
    if not results:
        return ""
    lines = ["## Evaluation", "", "| task | dataset | metric | value |", "|---|---|---|---|"]
    for result in results:
        cells = (result.task_type, result.dataset_name, result.metric_name or result.metric_type, result.metric_value)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n\n"


def make_model_card(
    model: PreTrainedModel,
    repo_id: str = "user/name",
    *,
    license: str | None = None,
    base_model: str | None = None,
    evaluation: Sequence[EvalResult] = (),
    loads_patched: bool = False,
) -> ModelCard:
    """The card of a LongNet, a slide encoder or a patched model; `card.push_to_hub(repo_id)` or `card.save(path)` it.

    Args:
        model: whose card it is.
        repo_id: where it will lie: the example of loading says so.
        license: of the weights, as the Hub names it ("mit"); None says that nobody has told.
        base_model: what the weights were made from; a patched model's own origin by default.
        evaluation: results, which stand in the metadata as well, where the Hub reads them.
        loads_patched: whether the folder comes from `export_patched_model`.

    Raises:
        ValueError: a model without a schedule.
    """
    config = text_config_of(model.config)
    schedule = DilationSchedule.from_config(config)
    patched = getattr(config, "dilated_attention", None) is not None
    auto_class, name = _auto_class(model), repo_id.rpartition("/")[2]
    trust = "" if patched and not loads_patched else ", trust_remote_code=True"
    example = f'from transformers import {auto_class}\n\nmodel = {auto_class}.from_pretrained("{repo_id}"{trust})'
    if patched and not loads_patched:
        example = (
            "from modeling_longnet.patching import load_patched_model\n\n" f'model = load_patched_model("{repo_id}")'
        )
    origin = getattr(model, "name_or_path", "") if patched else ""
    data = ModelCardData(
        library_name="transformers",
        tags=list(TAGS),
        license=license,
        base_model=base_model or (origin if origin and not Path(origin).exists() else None),
        pipeline_tag=PIPELINES.get(auto_class),
        model_name=name if evaluation else None,
        eval_results=list(evaluation) or None,
    )
    table, options = _describe(schedule)
    extent = "dilated attention"
    if patched:
        extent += f" in {len(config.dilated_attention['layers'])} of its {config.num_hidden_layers} layers"
    intro = f"A {model.config.model_type} model with {extent}: {_cost(schedule)}"
    length, cells = schedule.segment_lengths[-1], min(32, schedule.segment_lengths[-1])
    text = TEXT.format(
        name=name, intro=intro, table=table, options=options, length=f"{length:,}", cells=cells,
        cell=f"{length / cells:,.6g}", picture=draw_schedule(schedule, cells), example=example,
        sinks=', "s" the sink tokens alone' if schedule.num_sink_tokens else "",
        loading=LOADING_PATCHED if patched else LOADING_LONGNET, evaluation=_evaluation_section(evaluation),
        license=f"The weights are licensed under {license}." if license else "No license of the weights was given.",
    )  # fmt: skip
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{text}")


def upload_with_card(self: PreTrainedModel, working_dir, repo_id: str, *args, **kwargs):
    """In place of what `push_to_hub` does last: a push writes our card where Transformers had only its template.

    A card that somebody wrote, or that lies in the repository already, is left as it is but for the tags.
    """
    path = Path(working_dir) / "README.md"
    if path.is_file() and AUTOMATIC_CARD in path.read_text(encoding="utf-8"):
        tags = ModelCard.load(path).data.tags or []
        exported = brings_its_code(self)
        card = make_model_card(self, repo_id, loads_patched=exported)
        card.data.tags += [tag for tag in tags if tag not in card.data.tags]
        card.save(path)
    return upload(self, working_dir, repo_id, *args, **kwargs)


__all__ = ["draw_schedule", "make_model_card"]
