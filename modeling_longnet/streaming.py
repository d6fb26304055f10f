"""Reads texts of any length in constant memory: chunk after chunk through a bounded cache.

    result = stream_loss(model, tokens, chunk_size=4096, state_path="run/state.safetensors")
    print(result.perplexity, result.buckets)

Ctrl-C ends a stream after the current chunk; with a `state_path` it is saved, and the next call goes on from there to
the very same numbers. Letters: N tokens of the text, Q of a chunk, V of the vocabulary.
"""

import contextlib
import math
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from .dilated_cache import DilatedCache
from .dilated_cache_file import load_cache, save_cache
from .dilation_schedule import LARGEST, as_integer
from .transformers_compat import changes_frequencies, length_dependent_rope, named_cache, text_config_of


FIRST_BUCKET = 1024  # tokens; each bucket of positions after it is as long as all before it
NUM_BUCKETS = 64


@dataclass(frozen=True)
class StreamResult:
    """tokens: how many were read. finished: whether that was all. loss: mean, in nats per predicted token.
    buckets: start, end, tokens, loss and perplexity over positions start..end-1, bucket lengths doubling."""

    tokens: int
    finished: bool
    loss: float
    perplexity: float
    buckets: list[dict]


@contextlib.contextmanager
def interrupts_noted() -> Iterator[list[int]]:
    """Within it Ctrl-C and SIGTERM only append to the list that it gives; a second one interrupts at once."""
    noted = []
    if threading.current_thread() is not threading.main_thread():
        yield noted
        return

    def note(number, frame):
        if noted:
            raise KeyboardInterrupt
        noted.append(number)
        print("\nstopping after this step; once more to stop at once", file=sys.stderr)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """While open the model is in evaluation mode; then each of its modules is in the mode that it had."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


class TextStream:
    """A text on its way through a model: what has been read, and the loss so far.

    Args:
        model: a causal LongNet, or a model that is patched in all its layers; it is read in evaluation mode.
        tokens: the text, anything with a length whose slices are integers: a tensor [N], an array, a list.
        chunk_size: Q. Other chunk sizes give the same numbers up to rounding.

    Raises:
        ValueError: a chunk size below 1, fewer than two tokens, a model with layers that keep their whole past, or one
            whose rotary frequencies depend on the length (dynamic, longrope) with a text beyond where they change.
    """

    def __init__(self, model: PreTrainedModel, tokens: Sequence[int], chunk_size: int = 4096):
        given, chunk_size = chunk_size, as_integer(chunk_size)
        if chunk_size is None or not 1 <= chunk_size <= LARGEST:
            raise ValueError(f"`chunk_size` must be an integer of at least 1, got {given!r}.")
        if not hasattr(tokens, "__len__") or not hasattr(tokens, "__getitem__") or isinstance(tokens, (str, dict)):
            raise ValueError(f"`tokens` must be a tensor, an array or a list of integers, got {tokens!r}.")
        shape = tuple(tokens.shape) if hasattr(tokens, "shape") else (len(tokens),)
        if len(shape) != 1 or shape[0] < 2:
            raise ValueError(f"`tokens` must be at least two, in one row, got {shape}.")
        rope = length_dependent_rope(text_config_of(model.config))
        if changes_frequencies(rope, min(chunk_size, len(tokens)), len(tokens)):
            raise ValueError(
                f"`model` has rope_type {rope[0]!r}, whose frequencies change with the length of a text beyond "
                f"{rope[1]} tokens, so that {len(tokens)} tokens in chunks of {chunk_size} would give other numbers "
                "than the whole text. Patch with a rope_scaling that does not depend on the length (yarn)."
            )
        self.model, self.tokens, self.chunk_size = model, tokens, chunk_size
        self.cache = DilatedCache(model.config)
        if len(self.cache.dilated_layers) < len(self.cache.layers):
            raise ValueError("`model` must have dilated attention in every layer: others would keep their whole past.")
        self.position = 0
        self.loss_sums = torch.zeros(NUM_BUCKETS, dtype=torch.float64)
        self.loss_counts = torch.zeros(NUM_BUCKETS, dtype=torch.float64)

    def next_logits(self) -> torch.Tensor:
        """Reads a chunk; returns its logits [Q, V], of which row i predicts the token behind the chunk's i-th."""
        chunk = self._read(self.position, self.position + self.chunk_size)
        with evaluating(self.model), torch.no_grad():
            logits = self.model(input_ids=chunk[None], use_cache=True, **named_cache(self.cache)).logits[0]
        self.position += len(chunk)
        return logits

    def _read(self, start: int, stop: int) -> torch.Tensor:
        part = self.tokens[start : min(stop, len(self.tokens))]
        try:
            chunk = torch.as_tensor(part)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"`tokens` must be integers, got {part!r} from place {start} on.") from error
        if chunk.is_floating_point() and chunk.numel() or chunk.is_complex() or chunk.dtype == torch.bool:
            raise ValueError(f"`tokens` must be integers, got {chunk.dtype} from place {start} on.")
        return chunk.to(device=self.model.device, dtype=torch.long)

    def step(self) -> None:
        """Reads a chunk and adds its losses."""
        start = self.position
        logits = self.next_logits()
        targets = self._read(start + 1, self.position + 1)
        losses = torch.nn.functional.cross_entropy(logits[: len(targets)].float(), targets, reduction="none")
        places = torch.arange(start + 1, start + 1 + len(targets))
        # The exponent of position / 1024: 0 below 1024, 1 below 2048, 2 below 4096.
        buckets = torch.frexp(places.double() / FIRST_BUCKET).exponent.clamp(min=0).long()
        self.loss_sums.index_add_(0, buckets, losses.double().cpu())
        self.loss_counts.index_add_(0, buckets, torch.ones_like(places, dtype=torch.float64))

    def save(self, path: str | Path) -> None:
        progress = {"position": torch.tensor(self.position), "chunk_size": torch.tensor(self.chunk_size)}
        save_cache(
            path, self.cache, self.model, **progress, loss_sums=self.loss_sums, loss_counts=self.loss_counts,
            last_token=self._read(self.position - 1, self.position).cpu(),
        )  # fmt: skip

    def load(self, path: str | Path) -> None:
        """Goes on from a saved state.

        Raises:
            ValueError: the state is damaged, of another model or schedule, or of another text or chunk size.
        """
        cache, state = load_cache(path, self.model)
        missing = {"position", "chunk_size", "loss_sums", "loss_counts", "last_token"} - set(state)
        if missing:
            raise ValueError(f"{path} is the state of no stream: it lacks {', '.join(sorted(missing))}.")
        position = int(state["position"])
        if int(state["chunk_size"]) != self.chunk_size:
            raise ValueError(f"`chunk_size` must be {int(state['chunk_size'])} as in {path}, got {self.chunk_size}.")
        last_token = self._read(position - 1, position).cpu()  # none, if the text ends before
        if not torch.equal(last_token, state["last_token"]):
            raise ValueError(f"{path} was written while reading another text than `tokens`.")
        self.cache, self.position = cache, position
        self.loss_sums, self.loss_counts = state["loss_sums"], state["loss_counts"]

    def run(
        self,
        stop: int | None = None,
        state_path: str | Path | None = None,
        save_every: int = 256,
        progress: bool = True,
    ) -> bool:
        """Reads on to position `stop` (the end of the text by default); returns False if it was interrupted.

        With a `state_path` the state is saved there every `save_every` chunks and at the end.
        """
        if as_integer(save_every) is None or save_every < 1:
            raise ValueError(f"`save_every` must be an integer of at least 1, got {save_every!r}.")
        stop = len(self.tokens) if stop is None else min(stop, len(self.tokens))
        bar = tqdm(total=stop, initial=self.position, unit="tok", unit_scale=True, disable=not progress)
        done = 0
        with interrupts_noted() as noted, bar:
            while self.position < stop and not noted:
                before = self.position
                self.step()
                done += 1
                bar.update(self.position - before)
                bar.set_postfix_str(f"perplexity {self.result().perplexity:.3f}", refresh=False)
                if state_path is not None and done % save_every == 0:
                    self.save(state_path)
            if state_path is not None and done:
                self.save(state_path)
        if noted and state_path is None:
            raise KeyboardInterrupt
        return not noted

    def result(self) -> StreamResult:
        buckets = []
        for index, (total, count) in enumerate(zip(self.loss_sums.tolist(), self.loss_counts.tolist())):
            if count:
                start = FIRST_BUCKET << (index - 1) if index else 0
                end = min(FIRST_BUCKET << index, len(self.tokens))
                loss = total / count
                buckets.append({"start": start, "end": end, "tokens": int(count), "loss": loss,
                                "perplexity": math.exp(loss)})  # fmt: skip
        loss = (self.loss_sums.sum() / self.loss_counts.sum()).item()
        return StreamResult(self.position, self.position >= len(self.tokens), loss, math.exp(loss), buckets)


def stream_logits(
    model: PreTrainedModel, tokens: Sequence[int], chunk_size: int = 4096
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yields (position of the first row, logits [Q, V]) chunk by chunk; arguments as in [`TextStream`]."""
    stream = TextStream(model, tokens, chunk_size)
    while stream.position < len(tokens):
        start = stream.position
        yield start, stream.next_logits()


def stream_loss(
    model: PreTrainedModel,
    tokens: Sequence[int],
    chunk_size: int = 4096,
    *,
    state_path: str | Path | None = None,
    save_every: int = 256,
    progress: bool = True,
) -> StreamResult:
    """Loss and perplexity of a text of any length, by position, in memory that does not grow with it.

    Args:
        model, tokens, chunk_size: as in [`TextStream`].
        state_path: a file to save the state in, every `save_every` chunks and at the end. If it exists the stream goes
            on from there, to the very numbers of a stream that was never interrupted.
        progress: show a progress bar.

    Raises:
        ValueError: see [`TextStream`]; a state of another model, schedule, text or chunk size, or a damaged one.
        KeyboardInterrupt: interrupted without a `state_path`. With one, the result says `finished=False`.
    """
    stream = TextStream(model, tokens, chunk_size)
    if state_path is not None and Path(state_path).exists():
        stream.load(state_path)
    stream.run(state_path=state_path, save_every=save_every, progress=progress)
    return stream.result()


__all__ = ["StreamResult", "TextStream", "stream_logits", "stream_loss"]
