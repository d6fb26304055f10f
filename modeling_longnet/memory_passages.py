"""Which passages of a bank a question is about: those that the model looks at more than when it is asked nothing.

Every question looks at some passages a lot: headings, first lines, whatever its heads rest on. So a question is
compared with one about nothing, layer by layer, for layers do not look alike, by the mass that the ranks of a passage's
blocks would have in a softmax, on average over heads and tokens:

    score of a passage = mean over layers of log (mass of the question + even) - log (mass of the other + even)

where `even` is what each passage would have if all had the same.

What is found is text, to be read again in front of the question and at close distance, where a model that was never
trained on long texts can tell several facts apart. In the manner of RETRO's neighbours (arXiv 2112.04426) and LongMem's
chunks (arXiv 2306.07174), but with the model's own queries and keys as the retriever; the comparison is ours. Many
passages found so are then ranked by how likely the question is behind each (arXiv 2204.07496).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from .dilated_memory_layer import MemoryLayer
from .dilation_schedule import DilationSchedule, as_integer
from .memory_attention import MemoryCall
from .memory_search import Index, hide_ineligible, rank_blocks
from .streaming import evaluating
from .transformers_compat import named_cache


TEMPLATE = "{passages}\n\nQuestion: {question}\nAnswer:"
NOTHING = "What is this?"
GAP = "\n...\n"  # between passages
QUERIES = 32  # that are ranked at once


@dataclass(frozen=True)
class Passage:
    """Tokens start .. stop - 1 of a bank; `score`: by how many nats more a question looks there, or its log-likelihood
    behind them."""

    start: int
    stop: int
    score: float

    def cut(self, input_ids: torch.Tensor, around: int) -> torch.Tensor:
        """Its tokens out of a bank's `input_ids` [N], with up to `around` more on each side."""
        return input_ids[max(0, self.start - around) : self.stop + around]


@dataclass(frozen=True)
class Answer:
    """`text`: what was said, without special tokens. `passages`: those that were read for it, the likeliest last."""

    text: str
    passages: tuple[Passage, ...]


class _Masses:
    """The mass of each of a bank's blocks in the layer that it watches, on average over heads and tokens."""

    def __init__(self, blocks: int):
        self.total = torch.zeros(blocks, dtype=torch.float64)

    def __call__(self, call: MemoryCall, query: torch.Tensor, index: Index, far_index: Index) -> None:
        schedule, length = call.schedule, query.shape[2]
        query = call.ranking.own_queries(query, call.heads.num_kv_heads)
        far_index = far_index if call.clamps(length) else None
        # A rank of "mean+bound" is two products of a query and a key.
        scale = call.scale / (2 if schedule.memory.rank == "mean+bound" else 1)
        count = len(self.total)
        for part, at in zip(query.split(QUERIES, dim=2), call.positions(length, query.device).split(QUERIES)):
            ranks = rank_blocks(call.ranking, part, index, far_index, at, count)
            hide_ineligible(ranks, schedule, at, settled=count)  # those in a window too: a text may end with the answer
            mass = (ranks.float() * scale).softmax(-1).nan_to_num().mean((1, 2)).sum((0, 1))
            self.total += mass.double().cpu() / length


def _mass(model: PreTrainedModel, bank, question: torch.Tensor) -> torch.Tensor:
    """In each layer with a memory of each block of the bank, [layers, n], float64."""
    cache = bank.start_cache(model)
    layers = [layer for layer in cache.dilated_layers if isinstance(layer, MemoryLayer) and layer.searches]
    for layer in layers:
        layer.watch = _Masses(len(bank) // cache.schedule.memory.block_size)
    with evaluating(model):
        model.base_model(input_ids=question[None].to(model.device), use_cache=True, **named_cache(cache))
    return torch.stack([layer.watch.total for layer in layers])


def as_tokens(name: str, tokens, model: PreTrainedModel, least: int) -> torch.Tensor:
    """Tokens in a row, [T], int64, on the CPU.

    Raises:
        ValueError: for what is not that, fewer than `least`, or no tokens of the model.
    """
    wanted = f"`{name}` must be tokens in a row, integers, at least {least} of them"
    try:
        ids = torch.as_tensor(tokens)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{wanted}, got {tokens!r:.100}.") from error
    is_other = ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool
    if is_other and ids.numel() or ids.dim() != 1 or len(ids) < least:
        raise ValueError(f"{wanted}, got {ids.dtype} of shape {tuple(ids.shape)}.")
    ids, words = ids.long().cpu(), len(model.get_input_embeddings().weight)
    if len(wrong := ids[(ids < 0) | (ids >= words)]):
        raise ValueError(f"`{name}` must hold tokens of the model, 0 to {words - 1}, got {wrong[0]}.")
    return ids


@torch.inference_mode()
def find_passages(model: PreTrainedModel, bank, question, nothing, *, count: int = 8, size: int = 64) -> list[Passage]:
    """See [`MemoryBank.find_passages`]."""
    bank.check(model)
    question, nothing = (as_tokens(*x, model, 2) for x in (("question", question), ("nothing", nothing)))
    memory = DilationSchedule.from_config(model.config).memory
    if memory.only_layers == ():
        raise ValueError("`model` finds passages by the heads that have a memory, and its `memory` names none.")
    block = memory.block_size
    if as_integer(count) is None or count < 1:
        raise ValueError(f"`count` must be an integer of at least 1, got {count!r}.")
    if as_integer(size) is None or size < block or size % block:
        raise ValueError(f"`size` must be a multiple of the memory's `block_size`, {block}, got {size!r}.")
    known = tuple(nothing.tolist())
    if known not in bank.masses:
        bank.masses[known] = _mass(model, bank, nothing)
    masses = torch.stack([_mass(model, bank, question), bank.masses[known]])
    wanted = -(-len(bank) // size) * (size // block)  # the last tokens may be no whole block
    masses = torch.nn.functional.pad(masses, (0, wanted - masses.shape[-1]))
    masses = masses.unflatten(-1, (-1, size // block)).sum(-1)
    about, beside = (masses + 1 / masses.shape[-1]).log()
    score = (about - beside).mean(0)
    best = score.topk(min(count, len(score))).indices.sort().values.tolist()
    return [Passage(i * size, min((i + 1) * size, len(bank)), round(score[i].item(), 3)) for i in best]


@torch.inference_mode()
def rank_passages(model: PreTrainedModel, bank, passages: Sequence[Passage], question, *, around: int) -> list[Passage]:
    """See [`MemoryBank.rank_passages`]."""
    question, ranked = as_tokens("question", question, model, 2), []
    if as_integer(around) is None or around < 0:
        raise ValueError(f"`around` must be an integer of at least 0, got {around!r}.")
    for passage in passages:
        if not 0 <= passage.start < passage.stop <= len(bank):
            raise ValueError(f"`passages` must lie in the bank's {len(bank)} tokens, got {passage}.")
    with evaluating(model):
        for passage in passages:
            ids = torch.cat([passage.cut(bank.input_ids, around), question])[None].to(model.device)
            logits = model(input_ids=ids, use_cache=False, logits_to_keep=len(question) + 1).logits[0, :-1]
            told = logits.float().log_softmax(-1).gather(-1, ids[0, -len(question) :, None])
            ranked.append(replace(passage, score=round(told.sum().item(), 3)))
    return sorted(ranked, key=lambda passage: passage.score, reverse=True)


def ask(
    model: PreTrainedModel,
    bank,
    tokenizer,
    question: str,
    *,
    template: str,
    nothing: str,
    candidates: int,
    passages: int,
    around: int,
    generation: dict,
) -> Answer:
    """See [`MemoryBank.ask`]."""
    head, _, tail = str(template).partition("{passages}")
    if "{question}" not in tail or "{passages}" in tail:
        raise ValueError(f"`template` must have {{passages}} once, and {{question}} behind it, got {template!r}.")
    if as_integer(passages) is None or passages < 1:
        raise ValueError(f"`passages` must be an integer of at least 1, got {passages!r}.")
    for name, text in (("question", question), ("nothing", nothing)):
        if not isinstance(text, str):
            raise ValueError(f"`{name}` must be a text, got {text!r}.")
    several = {"num_return_sequences", "return_dict_in_generate"} & set(generation)
    if several:
        raise ValueError(f"`ask` gives one answer, and does not take `{several.pop()}`.")

    def encode(text: str, special: bool = False) -> list[int]:
        return tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]

    asked, beside = (encode(tail.replace("{question}", x)) for x in (question, nothing))
    found = find_passages(model, bank, asked, beside, count=candidates)
    best = rank_passages(model, bank, found, asked, around=around)[:passages][::-1]
    prompt, gap = encode(head, special=True), encode(GAP)
    for passage in best:
        prompt += passage.cut(bank.input_ids, around).tolist() + gap
    ids = torch.tensor([prompt + asked], device=model.device)
    if "generation_config" not in generation:
        if "max_length" not in generation:
            # Not asked by its own marks, a chat model may end at once, or behind a line break.
            longest = generation.get("max_new_tokens", 64)
            generation = {"min_new_tokens": min(2, longest), "max_new_tokens": longest} | generation
        generation = {"do_sample": False} | generation
    with evaluating(model):  # stop strings want the tokenizer
        said = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), tokenizer=tokenizer, **generation)
    return Answer(tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True).strip(), tuple(best))


__all__ = ["Answer", "Passage", "ask", "find_passages", "rank_passages"]
