"""Attention of one query position in few kernel calls: what a plan says of it, with equal heads put together.

A plan for many queries has a block per set of heads of equal offsets. For a single query all heads that see the same
keys become the rows of one call, stretches of keys that follow on one another become one stretch, and calls that
differ by a regular distance in heads and keys become one batch:

        blocks                          pieces, for 4 query heads over 2 key/value heads at position 9
        heads 0 2, keys 8 9             heads 0 1 | 2 3, keys 8 9
        heads 1 3, keys 8 9
        heads 1, keys 1 3 5 7           heads 1 | 3, keys 1 3 5 7
        heads 3, keys 1 3 5 7

Letters: B batch, H query heads, G key/value heads, M rows of keys, D head dimension.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import NamedTuple

import torch

from .attention_kernels import Kernel
from .dilation_plan import Block, Rows, plan_blocks


class Piece(NamedTuple):
    """One kernel call of `units` times `members` query heads: unit u has the query heads
    head + u * head_step + (0 .. members - 1) * member_step and reads, of key/value head kv + u * kv_step, the rows
    start + u * start_step + (0 .. count - 1) * step."""

    head: int
    kv: int
    start: int
    head_step: int
    kv_step: int
    start_step: int
    units: int
    members: int
    member_step: int
    step: int
    count: int


def _progressions(items: list[tuple[int, ...]]) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], int]]:
    """Tuples in order, cut into (first, difference, how many) of equal differences that are not negative."""
    while items:
        steps = [tuple(b - a for a, b in zip(*pair)) for pair in zip(items, items[1:])]
        count = 1 + next((i for i, step in enumerate(steps) if step != steps[0] or min(step) < 0), len(steps))
        yield items[0], steps[0] if count > 1 else (0,) * len(items[0]), count
        items = items[count:]


def _joined(stretches: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Stretches (step, start, count), those put together of which one begins where the other ends."""
    joined = []
    for step, start, count in sorted(stretches):
        if joined and joined[-1][0] == step and start == joined[-1][1] + step * joined[-1][2]:
            count += joined[-1][2]
            start = joined.pop()[1]
        joined.append((step, start, count))
    return joined


def join_blocks(blocks: Iterable[Block], locate: Callable[[Block], Iterable[Rows]]) -> tuple[Piece, ...]:
    """The pieces of a plan for one query; `locate` tells where the keys of a block lie. A piece of all heads is first.

    Args:
        blocks: of kind "full".
    """
    seen = defaultdict(list)
    for block in blocks:
        stretches = [(rows.step, rows.start, rows.count) for rows in locate(block)]
        heads, kv_heads = (range(x.start, x.stop, x.step) for x in (block.heads, block.kv_heads))
        for pair in zip(heads, kv_heads):
            seen[pair] += stretches
    members = defaultdict(list)
    for (head, kv), stretches in sorted(seen.items()):
        for nth, (step, start, count) in enumerate(_joined(stretches)):  # a piece has no head twice
            members[nth, kv, start, step, count].append((head,))
    units = defaultdict(list)
    for (nth, kv, start, step, count), alike in members.items():
        for (head,), (member_step,), number in _progressions(alike):
            units[nth, number, member_step, step, count].append((head, kv, start))
    pieces = [
        Piece(*first, *steps, number, *alike)
        for (_, *alike), items in units.items()
        for first, steps, number in _progressions(items)
    ]
    return tuple(sorted(pieces, key=lambda piece: -piece.units * piece.members))


@lru_cache(maxsize=512)
def plan_token(*arguments) -> tuple[Piece, ...]:
    """`plan_blocks` (same arguments, one query) as pieces of keys in the order of their positions."""
    return join_blocks(plan_blocks(*arguments), lambda block: [block.region.keys])


def _query_view(x: torch.Tensor, piece: Piece) -> torch.Tensor:
    """[B, H, 1, ...] as the view [B, units, members, ...]."""
    batch, heads, _, *inner = x.stride()
    return x.as_strided(
        (len(x), piece.units, piece.members, *x.shape[3:]),
        (batch, piece.head_step * heads, piece.member_step * heads, *inner),
        x.storage_offset() + piece.head * heads,
    )


def _key_view(x: torch.Tensor, piece: Piece) -> torch.Tensor:
    """[B, G, M, D] as the view [B, units, count, D]."""
    batch, heads, rows, width = x.stride()
    return x.as_strided(
        (len(x), piece.units, piece.count, x.shape[3]),
        (batch, piece.kv_step * heads + piece.start_step * rows, piece.step * rows, width),
        x.storage_offset() + piece.kv * heads + piece.start * rows,
    )


def attend_piece(kernel: type[Kernel], piece: Piece, query, key, value, scale: float) -> tuple[torch.Tensor, ...]:
    """(out [B, units, members, D], log-sum-exp [B, units, members]) of one piece."""
    return kernel.forward(_query_view(query, piece), _key_view(key, piece), _key_view(value, piece), False, scale)


def only_piece(plans: list[tuple[Piece, ...]], query: torch.Tensor) -> Piece | None:
    """The one piece of the one plan, if there is no other and its heads are those of query [B, H, 1, D] in order."""
    if len(plans) != 1 or len(plans[0]) != 1:
        return None
    (piece,) = plans[0]
    in_order = piece.head == 0 and piece.head_step == (piece.members if piece.units > 1 else 0)
    in_order &= piece.member_step == (1 if piece.members > 1 else 0)
    return piece if in_order and piece.units * piece.members == query.shape[1] else None


def attend_token(
    kernel: type[Kernel],
    pieces: tuple[Piece, ...],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
) -> None:
    """Attention of query [B, H, 1, D] to key and value [B, G, M, D]: in place, `out` [B, H, 1, D] and `lse` [B, H, 1]
    of one dtype, which hold 0 and -inf."""
    for index, piece in enumerate(pieces):
        part, part_lse = attend_piece(kernel, piece, query, key, value, scale)
        total, total_lse = _query_view(out, piece), _query_view(lse, piece)
        if index == 0:
            total.copy_(part)
            total_lse.copy_(part_lse)
            continue
        total.lerp_(part.to(out.dtype), torch.sigmoid(part_lse - total_lse).unsqueeze(-1))
        torch.logaddexp(total_lse, part_lse, out=total_lse)
