"""A batch of whole texts becomes one rank's slice of it: what the collator does, and what the model is told about it.

Letters: B batch, N tokens of a text, n tokens of a slice, W ranks that share a text; n = ceil(N / W).
"""

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .dilated_attention import ELSEWHERE, find_runs
from .document_ids import find_documents
from .patch_mask import dilated_mask, read_compact_mask
from .sequence_exchange import Slices


SHARD = ELSEWHERE  # the entry of a batch, and the argument of the model, that holds its `Shard`
PADDING_VALUES = {"labels": -100, "shift_labels": -100}
# What padding-free collators add for flash attention; the documents are in `position_ids` too.
DROPPED = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


@dataclass(eq=False)
class Shard:
    """Which slice of which texts a batch is. Its tensors stay on the CPU, whatever moves the batch to a device.

    attention_mask, position_ids: [B, N] as the collator got them, or None. fingerprint: of the whole texts.
    """

    rank: int
    size: int
    batch: int
    length: int
    attention_mask: torch.Tensor | None
    position_ids: torch.Tensor | None
    has_labels: bool
    labels_are_shifted: bool
    fingerprint: int

    @property
    def slice_length(self) -> int:
        return -(-self.length // self.size)

    def cut(self, x: torch.Tensor, value: int = 0) -> torch.Tensor:
        """This rank's slice [B, n, ...] of x [B, N, ...]; what lies beyond N is `value`."""
        padding = [0, 0] * (x.dim() - 2) + [0, self.slice_length * self.size - self.length]
        x = torch.nn.functional.pad(x, padding, value=value)
        return x.narrow(1, self.rank * self.slice_length, self.slice_length).contiguous()


@dataclass(eq=False)
class Place:
    """Where a slice lies: among the slices of its batch, its `position_ids` [B, n], and its places in the documents."""

    slices: Slices
    position_ids: torch.Tensor
    document_positions: torch.Tensor


def locate_longnet(shard: Shard) -> Place:
    """As `LongNetModel` reads masks and positions of whole texts."""
    batch, length = shard.batch, shard.length
    documents = find_documents(
        shard.attention_mask,
        shard.position_ids,
        batch_size=batch,
        query_length=length,
        query_offset=0,
        key_length=length,
        device=torch.device("cpu"),
    )
    if documents.order is not None:
        raise ValueError(
            "`attention_mask` must not have padding between the tokens of a text with sequence parallelism: the tokens "
            "would have to move to other ranks. Pad on the left or on the right."
        )
    positions = documents.positions.expand(batch, -1)
    return _place(shard, documents.ids, positions if shard.position_ids is None else shard.position_ids, positions)


def locate_patched(shard: Shard, is_rotary: bool) -> Place:
    """As a patched model reads masks and positions of whole texts."""
    batch, length = shard.batch, shard.length
    mask, position_ids = shard.attention_mask, shard.position_ids
    if position_ids is None:
        if mask is not None and not is_rotary and not bool(mask[:, 0].all()):
            raise ValueError(
                "`position_ids` must be given with left padding, for a model that adds positions to its tokens: how "
                "it counts them itself cannot be seen from outside."
            )
        position_ids = torch.arange(length).expand(batch, -1)
    compact = dilated_mask(batch, length, length, attention_mask=mask)
    documents = read_compact_mask(compact, position_ids, length)
    if documents.order is not None:
        raise ValueError("`attention_mask` has padding between the tokens of a row, which ranks cannot put aside.")
    return _place(shard, documents.ids, position_ids, position_ids)


def _place(shard, ids, position_ids, document_positions) -> Place:
    runs = tuple((rows.start, rows.stop, *run) for rows, *run in find_runs(ids, shard.batch, shard.length))
    slices = Slices(shard.batch, shard.slice_length, shard.size, runs)
    return Place(slices, shard.cut(position_ids), shard.cut(document_positions))


def _check_batch(batch: Mapping[str, Any]) -> torch.Tensor:
    """The texts [B, N] (or their vectors) of a collated batch."""
    if not isinstance(batch, Mapping):
        raise ValueError(f"`collate` must return a dictionary of tensors, got {type(batch).__name__}.")
    tokens = batch.get("input_ids", batch.get("inputs_embeds"))
    if not isinstance(tokens, torch.Tensor) or tokens.dim() < 2:
        raise ValueError(f"`collate` must return `input_ids` [B, N] or `inputs_embeds`, got {sorted(batch)}.")
    mask = batch.get("attention_mask")
    if mask is not None and mask.shape != tokens.shape[:2]:
        raise ValueError(
            f"`attention_mask` must have the shape {tuple(tokens.shape[:2])} of the texts, got {tuple(mask.shape)}."
        )
    return tokens


def _fingerprint(tokens: torch.Tensor) -> int:
    return zlib.crc32(tokens.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())


class ShardingCollator:
    """Collates whole texts, then keeps this rank's slice. It holds no process group: workers of a loader may run it.

    The labels are shifted before they are cut (each slice's last token predicts the next slice's first one), and
    `num_items_in_batch` is the number of targets of the whole batch divided by the number of ranks: the mean over the
    ranks of a loss with that divisor is the mean over all targets, however unevenly the ranks share them.

    Args:
        collate: makes a dictionary of tensors of a list of examples.
        rank, size: of the ranks that share a text.
        shift_labels: whether the labels are those of a causal language model, `labels` equal to `input_ids`.
    """

    def __init__(self, collate: Callable[[list], Mapping[str, Any]], rank: int, size: int, shift_labels: bool = True):
        self.collate, self.rank, self.size, self.shift_labels = collate, rank, size, shift_labels

    def __call__(self, examples: list) -> dict[str, Any]:
        return self.shard(self.collate(examples))

    def shard(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The slice of a batch of whole texts; entries that do not run along the texts stay as they are."""
        tokens = _check_batch(batch)
        batch = {name: value for name, value in batch.items() if name not in DROPPED}
        if batch.get("position_ids") is not None:
            batch["position_ids"] = batch["position_ids"].expand(len(tokens), -1)
        if batch.get("labels") is not None or batch.get("shift_labels") is not None:
            batch.update(self._targets(batch))
        size, (rows, length) = self.size, tokens.shape[:2]
        shard = Shard(
            self.rank, size, rows, length, batch.get("attention_mask"), batch.get("position_ids"),
            batch.get("labels") is not None, self.shift_labels, _fingerprint(tokens),
        )  # fmt: skip
        for name, value in batch.items():
            if isinstance(value, torch.Tensor) and value.shape[:2] == (rows, length):
                batch[name] = shard.cut(value, PADDING_VALUES.get(name, 0))
        return batch | {SHARD: shard}

    def _targets(self, batch: dict[str, Any]) -> dict[str, Any]:
        labels = batch.get("shift_labels")
        if labels is None:
            labels = batch["labels"]
            if self.shift_labels:
                labels = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        shifted = {"shift_labels": labels} if self.shift_labels else {}
        count = int((labels != -100).sum())
        return {"labels": labels, **shifted, "num_items_in_batch": max(1, count) / self.size}
