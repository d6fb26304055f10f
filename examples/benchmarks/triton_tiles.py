"""Which tiles are fastest: each Triton kernel by itself, for the table that the backend chooses by.

A part of gpu_suite.py. Letters: D head dimension, w segment length, r dilation rate.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from modeling_longnet import triton_attention
from modeling_longnet.triton_attention import Tiles


# Kernel: rows of queries and keys, warps, stages. What is first is chosen where others are hardly faster.
TILES = {
    "forward": [(64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 4, 2)],
    "query_grad": [(64, 64, 4, 2), (64, 64, 4, 3), (64, 32, 4, 2)],
    "key_grad": [
        (64, 64, 4, 2), (32, 64, 4, 2), (32, 64, 4, 3), (64, 32, 4, 2), (32, 32, 4, 2), (32, 128, 8, 2),
        (64, 128, 8, 2),
    ],
}  # fmt: skip


@contextmanager
def choosing(tiles: dict[tuple[str, int], Tiles]) -> Iterator[None]:
    """Launches in half precision take these tiles, by kernel and D, in place of those that the backend chooses."""
    choose = triton_attention.choose_tiles

    def ours(kernel: str, width: int, dtype: torch.dtype) -> Tiles:
        given = None if dtype == torch.float32 else tiles.get((kernel, width))
        return given or choose(kernel, width, dtype)

    triton_attention.choose_tiles = ours
    try:
        yield
    finally:
        triton_attention.choose_tiles = choose


def seconds_of(kernel: str, run: Callable[[], object], repeats: int) -> float:
    """The least seconds that launches of one kernel took in a call of `run`, by the GPU's own clock."""
    start, found = triton_attention.start_kernel, []

    def timed(function, *others):
        if function.__name__ != f"{kernel}_kernel":
            return start(function, *others)
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        start(function, *others)
        events[1].record()
        found[-1].append(events)

    triton_attention.start_kernel = timed
    try:
        for _ in range(repeats + 1):
            found.append([])
            run()
        torch.cuda.synchronize()
    finally:
        triton_attention.start_kernel = start
    return min(sum(a.elapsed_time(b) for a, b in launches) for launches in found[1:]) / 1000


def measure_tiles(run: Callable[[], object], width: int, repeats: int) -> Iterator[dict]:
    """For each kernel that a forward and backward launch, and each of its tiles: the seconds it takes."""
    for kernel, candidates in TILES.items():
        for shape in candidates:
            row = {"kernel": kernel, "D": width, "tiles": list(shape)}
            try:
                with choosing({(kernel, width): Tiles(*shape)}):
                    yield row | {"seconds": seconds_of(kernel, run, repeats)}
            except Exception as error:  # whatever the compiler or a launch says belongs into the record
                yield row | {"error": f"{type(error).__name__}: {error}"[:200]}


def fastest(rows: list[dict], margin: float = 1.03) -> dict[tuple[str, int], Tiles]:
    """Per kernel and D the first tiles of TILES that are, added up over settings, within `margin` of the fastest."""
    chosen = {}
    for kernel, width in sorted({(row["kernel"], row["D"]) for row in rows}):
        sums: dict[tuple, float] = {}
        for row in rows:
            if (row["kernel"], row["D"]) == (kernel, width):
                shape = tuple(row["tiles"])
                sums[shape] = sums.get(shape, 0.0) + row.get("seconds", float("inf"))
        within = [shape for shape in TILES[kernel] if sums[shape] <= margin * min(sums.values()) < float("inf")]
        if within:
            chosen[kernel, width] = Tiles(*within[0])
    return chosen
