"""Banks: a text that a model with a memory has read once, on disk, for any number of caches to go on from.

A bank is what a cache of store="disk" leaves: pages of keys and values, the index of their blocks, and a state
(memory_pages.py). Caches read it in place, write nothing into it, and keep what comes behind in a store of their own.

A cache that begins with a bank gives the numbers of a cache that has read the bank's text by itself, in the same
chunks: bit for bit, but for what reading in other chunks does to rounding. Documents of one bank follow each other in
one text, so a later one is read with the earlier ones in mind. Distances are the schedule's affair: true ones up to its
`max_distance`, beyond that each block is read as if it began there, whether it lies in a bank or not.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from .dilated_cache import DilatedCache
from .dilated_cache_file import (
    FOLDER_FORMAT,
    check_fingerprints,
    extra_tensors,
    is_memory_folder,
    load_cache,
    open_pages,
    read_state,
    restore_layer,
    save_cache,
)
from .dilated_memory_layer import MemoryLayer
from .dilation_schedule import DilationSchedule, as_integer
from .memory_pages import STATE_NAME, StoreFolder
from .memory_passages import NOTHING, TEMPLATE, Answer, Passage, as_tokens, ask, find_passages, rank_passages
from .memory_store import BankedStore, RowFiles, make_store
from .streaming import evaluating, interrupts_noted
from .transformers_compat import named_cache


SEPARATOR = "\n\n"


class MemoryBank:
    """A text on disk as a model has read it: `input_ids` [N], and where its documents begin.

    Open one with `MemoryBank.open(path)`, or have one made by `MemoryBank.from_texts`.
    """

    def __init__(self, folder: StoreFolder, metadata: dict, tensors: dict[str, torch.Tensor]):
        self.folder, self.metadata, self._tensors = folder, metadata, tensors
        self.input_ids = tensors["extra.input_ids"].long()
        self.document_starts = tensors["extra.document_starts"].tolist()
        self._rows: dict[tuple[int, torch.device], RowFiles] = {}
        self.masses: dict[tuple[int, ...], torch.Tensor] = {}  # of questions about nothing: see memory_passages.py

    def __len__(self) -> int:
        """Tokens."""
        return len(self.input_ids)

    def __reduce__(self):  # opened anew: its pages are files
        return self.open, (self.folder.path,)

    @classmethod
    def open(cls, path: str | Path) -> "MemoryBank":
        """The bank in a folder, which may be read-only and is not trusted: sizes are checked, no code is in it.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is damaged, was never read to its end, or is being written to.
        """
        folder = StoreFolder(path, is_bank=True)
        metadata, tensors = read_state(folder.state_path, None, FOLDER_FORMAT)
        ids, starts, positions = (tensors.get(x) for x in ("extra.input_ids", "extra.document_starts", "positions"))
        if ids is None or starts is None or ids.dim() != 1 or starts.dim() != 1 or positions.shape != (1,):
            raise ValueError(f"{path} is a saved cache, but no bank: wanted one row and its text.")
        if int(positions) != len(ids):
            raise ValueError(
                f"{path} holds {int(positions)} of {len(ids)} tokens: call `MemoryBank.from_texts` again to read on."
            )
        return cls(folder, metadata, tensors)

    @classmethod
    def from_texts(
        cls,
        model: PreTrainedModel,
        tokenizer,
        documents: Sequence[str],
        path: str | Path,
        *,
        chunk_size: int = 1024,
        reach: int | None = None,
        save_every: int = 16,
        progress: bool = True,
    ) -> "MemoryBank":
        """Reads documents, one behind the other, into a new bank; goes on where it was stopped.

        Args:
            model: with a memory, patched in all its layers or a LongNet. tokenizer: called with each document; the
                first one gets its special tokens.
            path: a folder. What was read stands there every `save_every` chunks and after Ctrl-C.
            chunk_size: tokens that are read at once.
            reach: while it reads, a chunk chooses among the blocks of so many tokens before it, and a token costs the
                same however long the text; whoever asks the bank chooses among all. None: among all, and the bank is
                the same text in the context. At least the schedule's window.

        Raises:
            ValueError: no document, a model without a memory, a folder that holds another text or another model's, or
                was read with another `reach`.
            KeyboardInterrupt: after what was read has been saved.
        """
        if isinstance(documents, str) or not documents or not all(isinstance(x, str) for x in documents):
            raise ValueError(f"`documents` must be a list of texts, got {documents!r:.200}.")
        pieces = []
        for number, document in enumerate(documents):
            text = document + (SEPARATOR if number + 1 < len(documents) else "")
            pieces.append(tokenizer(text, add_special_tokens=number == 0, verbose=False)["input_ids"])
        return cls.from_tokens(
            model, pieces, path, chunk_size=chunk_size, reach=reach, save_every=save_every, progress=progress
        )

    @classmethod
    def from_tokens(
        cls,
        model: PreTrainedModel,
        documents: Sequence[Sequence[int]],
        path: str | Path,
        *,
        chunk_size: int = 1024,
        reach: int | None = None,
        save_every: int = 16,
        progress: bool = True,
    ) -> "MemoryBank":
        """`from_texts` of documents that are tokens already."""
        for name, value in (("chunk_size", chunk_size), ("save_every", save_every)):
            if as_integer(value) is None or value < 1:
                raise ValueError(f"`{name}` must be an integer of at least 1, got {value!r}.")
        pieces = [as_tokens("documents", x, model, least=0) for x in documents]
        *starts, total = accumulate(map(len, pieces), initial=0)
        if not total:
            raise ValueError("`documents` must hold at least a token.")
        ids = torch.cat(pieces)
        text = {
            "input_ids": ids.int(),
            "document_starts": torch.tensor(starts),
        }
        if reach is not None:
            text["reach"] = torch.tensor(_check_reach(reach, model))
        bank = _read_before(text, path)
        if bank is not None:
            bank.check(model)
            return bank
        cache = _begin(model, text, path)
        for layer in cache.dilated_layers if reach is not None else ():
            if isinstance(layer, MemoryLayer):
                layer.reach = reach
        try:
            _read(model, cache, text, path, chunk_size, save_every, progress)
        finally:
            cache.close()
        return cls.open(path)

    def check(self, model: PreTrainedModel) -> None:
        """Refuses a model that is not the one that read this bank.

        Raises:
            ValueError: other weights, another schedule, other dimensions to rank in.
        """
        check_fingerprints(self.folder.path, self.metadata, model)

    def rows(self, layer: MemoryLayer, index: int, device: torch.device) -> RowFiles:
        """What it holds for a layer, the `index`-th of the dilated ones."""
        if (index, device) not in self._rows:
            store = open_pages(self.folder, layer, index, self.metadata, [len(self)], device)
            self._rows[index, device] = store.rows[0]
        return self._rows[index, device]

    def start_cache(
        self, model: PreTrainedModel, batch_size: int = 1, *, store: str = "device", path: str | Path | None = None
    ) -> DilatedCache:
        """A cache whose rows all have read this bank: see `start_cache`."""
        return start_cache(model, [self] * batch_size, store=store, path=path)

    def ask(
        self,
        model: PreTrainedModel,
        tokenizer,
        question: str,
        *,
        template: str = TEMPLATE,
        nothing: str = NOTHING,
        candidates: int = 16,
        passages: int = 2,
        around: int = 16,
        **generation,
    ) -> Answer:
        """Answers a question from the passages that it is about, which the model reads again in front of it.

        Args:
            template: of the prompt, with {passages} and behind it {question}; a chat model's own marks belong here.
            nothing: a question about nothing in particular, which passages must be about less.
            candidates: passages that are found (`find_passages`); `passages` of them, under which the question is
                likeliest (`rank_passages`), are read again, each with `around` tokens before and after it.
            generation: for `generate`; greedy, 2 to 64 tokens, unless it, or a `generation_config`, says otherwise.

        Returns:
            The answer, and the passages to check it by.

        Raises:
            ValueError: for arguments that are not that, or another model than the bank's.
        """
        return ask(
            model, self, tokenizer, question, template=template, nothing=nothing, candidates=candidates,
            passages=passages, around=around, generation=generation,
        )  # fmt: skip

    def find_passages(
        self, model: PreTrainedModel, question: Sequence[int], nothing: Sequence[int], *, count: int = 8, size: int = 64
    ) -> list[Passage]:
        """The `count` passages that a question is about most, in the order of the text, to be read again before it.

        Args:
            question: tokens [T] of the question, as it would stand behind the text. nothing: those of one about nothing
                in particular ("Question: What is this? Answer: This is"), in the same form.
            size: tokens of a passage, a multiple of the memory's `block_size`.

        Raises:
            ValueError: for arguments that are not that, or another model than the bank's.
        """
        return find_passages(model, self, question, nothing, count=count, size=size)

    def rank_passages(
        self, model: PreTrainedModel, passages: Sequence[Passage], question: Sequence[int], *, around: int = 16
    ) -> list[Passage]:
        """Passages by the log-likelihood of a question [T] read right behind each of them, with `around` tokens before
        and after it: the likeliest first. Dearer and sharper than what finds them.

        Raises:
            ValueError: for arguments that are not that.
        """
        return rank_passages(model, self, passages, question, around=around)

    def restore_layer(self, layer, index: int, device: torch.device) -> None:
        """Fills a layer without a memory with what it held at the end of the bank."""
        restore_layer(self.folder.state_path, layer, index, self._tensors, device)


def _check_reach(reach: object, model: PreTrainedModel) -> int:
    schedule = DilationSchedule.from_config(model.config)
    if as_integer(reach) is None or reach < schedule.window:
        raise ValueError(
            f"`reach` must be None or an integer of at least the schedule's window, {schedule.window}, got {reach!r}."
        )
    return as_integer(reach)


def _is_text(extra: dict[str, torch.Tensor], text: dict[str, torch.Tensor]) -> bool:
    return set(extra) == set(text) and all(torch.equal(extra[name], x) for name, x in text.items())


def _read_before(text: dict[str, torch.Tensor], path: str | Path) -> MemoryBank | None:
    """The bank of this text in a folder, if it was read to its end: others may be reading it too."""
    if not is_memory_folder(path):
        return None
    _, tensors = read_state(Path(path) / STATE_NAME, None, FOLDER_FORMAT)
    done = tensors["positions"].tolist() == [len(text["input_ids"])]
    return MemoryBank.open(path) if done and _is_text(extra_tensors(tensors), text) else None


def _begin(model: PreTrainedModel, text: dict[str, torch.Tensor], path: str | Path) -> DilatedCache:
    """A cache to read the text into, or the one that has read a part of it."""
    if not is_memory_folder(path):
        cache = DilatedCache(model.config, store="disk", path=path)
        if len(cache.dilated_layers) < len(cache.layers):
            cache.close()
            raise ValueError("`model` must have dilated attention in every layer: others would keep their whole past.")
        return cache
    cache, extra = load_cache(path, model)
    if not _is_text(extra, text):
        cache.close()
        raise ValueError(
            f"`path`: {path} holds another text than `documents`, was read with another `reach`, or is no bank. Delete "
            "it first."
        )
    return cache


def _read(model, cache: DilatedCache, text, path, chunk_size: int, save_every: int, progress: bool) -> None:
    ids, position = text["input_ids"], cache.get_seq_length()
    done = 0
    bar = tqdm(total=len(ids), initial=position, unit="tok", unit_scale=True, desc="reading", disable=not progress)
    with evaluating(model), interrupts_noted() as noted, bar, torch.inference_mode():
        while position < len(ids) and not noted:
            chunk = ids[None, position : position + chunk_size].long().to(model.device)
            model.base_model(input_ids=chunk, use_cache=True, **named_cache(cache))
            position, done = position + chunk.shape[1], done + 1
            bar.update(chunk.shape[1])
            if done % save_every == 0 or position == len(ids) or noted:
                save_cache(path, cache, model, **text)
    if position < len(ids):
        raise KeyboardInterrupt


def start_cache(
    model: PreTrainedModel,
    banks: Sequence[MemoryBank | None],
    *,
    store: str = "device",
    path: str | Path | None = None,
) -> DilatedCache:
    """A cache for as many rows as there are banks, each of which has read its bank, and shares it with any others.

    Text goes on behind the banks: pass it alone to the model with this cache, or, to `generate`, behind `input_ids` of
    the bank. Beam search, `crop` and the like work as ever, on what came after the bank; `reset` is refused.

    Args:
        banks: of each row, made by this model; None for a row without.
        store, path: for what is read from now on, as in [`DilatedCache`].

    Raises:
        ValueError: a bank of another model; no bank; banks of several lengths for a model that counts positions where
            they cannot be put right: all layers must have a memory with `max_distance`.
    """
    banks = list(banks)
    found = {id(bank): bank for bank in banks if bank is not None}
    if not found:
        raise ValueError("`banks` must have at least one bank.")
    for bank in found.values():
        bank.check(model)
    counts = [0 if bank is None else len(bank) for bank in banks]
    cache = DilatedCache(model.config, store=store, path=path)
    layers, memory = cache.dilated_layers, cache.schedule.memory
    has_all = all(isinstance(layer, MemoryLayer) for layer in layers)
    if len(layers) < len(cache.layers):
        raise ValueError("`model` must have dilated attention in every layer: a bank holds nothing for others.")
    if len(set(counts)) > 1 and not (has_all and memory.max_distance is not None):
        raise ValueError(
            f"`banks` must be of one length for a model without `max_distance` in all layers, got {counts} tokens."
        )
    if len(found) > 1 and not has_all:
        raise ValueError("`banks` must be one bank for all rows where some layers have no memory.")
    device = model.device
    for index, layer in enumerate(layers):
        if isinstance(layer, MemoryLayer):
            layer.begin_with(_banked(layer, index, banks, device, store, cache.folder))
        else:
            next(iter(found.values())).restore_layer(layer, index, device)
            layer.map_batch(lambda x: x.repeat_interleave(len(banks), dim=0))
    cache.start(len(banks), device)
    cache.positions.copy_(torch.tensor(counts))
    cache.seen.fill_(max(counts))
    return cache


def _banked(layer: MemoryLayer, index: int, banks, device, store: str, folder: StoreFolder | None) -> BankedStore:
    """A layer's store: its banks' pages, and an own store that holds the last tokens, which are no whole block."""
    bases = [None if bank is None else bank.rows(layer, index, device) for bank in banks]
    shape = replace(next(base.shape for base in bases if base is not None), batch=len(banks))
    banked = BankedStore(bases, make_store(store, shape, folder, layer.layer_idx))
    for row, (base, begin) in enumerate(zip(bases, banked.begins)):
        if base is not None and begin < base.count:
            banked.own.write(slice(row, row + 1), 0, *base.span(begin, base.count))
    return banked


__all__ = ["MemoryBank", "start_cache"]
