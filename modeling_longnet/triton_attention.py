"""Dilated attention by Triton, one launch per pattern: what is launched, on which rows, with which tiles.

The kernels are in triton_kernels.py and triton_key_kernels.py and are imported when they first run. They read queries,
keys and values in place: no row is gathered, no result is merged, and nothing depends on the order of programs.

Letters: B batch, H query heads, G key/value heads, N tokens of the keys, Q tokens of the queries, D head dimension,
w segment length, r dilation rate, s offset of a head.
"""

import os
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache

import torch

from .dilation_schedule import DilationSchedule, Heads
from .document_ids import document_positions


# Positions are int32 inside the kernels, with room for the sums that lie beyond the last one.
MAX_TOKENS = 2**30


@dataclass(frozen=True)
class Launch:
    """One pattern: its segments of `w` tokens, its rate, and what earlier patterns leave of it.

    `inner`: under "once" the segment length of an earlier pattern that offers all of its own segment; 0 for none.
    `earlier`: the earlier patterns (w, r) whose segments must be compared, where no such one exists.
    """

    w: int
    r: int
    keys: bool = True
    local: bool = False
    after_window: bool = False
    inner: int = 0
    earlier: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Tiles:
    """Rows of queries and of keys in a program's tile, its warps and the stages of its pipeline."""

    BM: int
    BN: int
    num_warps: int
    num_stages: int


def choose_tiles(kernel: str, width: int, dtype: torch.dtype) -> Tiles:
    """In half precision up to heads of 128 as an H100 measured them (docs/results/gpu_suite_h100.json: 64 x 64 with
    4 warps, though spilling registers, beat 8 warps that do not); the others by the compile check."""
    if kernel == "sink_grad":
        return Tiles(min(64, 4096 // width), 16, 4, 1 if dtype == torch.float32 else 2)
    if dtype == torch.float32:
        return Tiles(32, 32, 4, 1) if width <= 64 else Tiles(16, 16, 4, 1)
    if width <= 128:
        return Tiles(64, 64, 4, 2)
    return Tiles(64, 32, 8, 2) if kernel == "forward" else Tiles(32, 32, 8, 2)


def why_not_triton(query: torch.Tensor) -> str | None:
    """The reason why these kernels cannot run on tensors like `query`, or None; Triton itself is there."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if query.device.type != "cuda" and not (interpreted and query.device.type == "cpu"):
        return f"Triton runs on CUDA (elsewhere in its interpreter, TRITON_INTERPRET=1), got {query.device.type!r}"
    if query.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"it runs float16, bfloat16 and float32, got {query.dtype}"
    if not 16 <= query.shape[-1] <= 256:
        return f"it takes head dimensions from 16 to 256, got {query.shape[-1]}"
    return None


# Compute capability: dtypes in which these kernels are chosen. On an H200 they were faster than PyTorch's from 16,384
# to 1,048,576 tokens, forward and with gradients, heads of 64 and 128 (docs/gpu.md). All else takes them by name only.
FASTER_ON = {(9, 0): (torch.float16, torch.bfloat16)}


def is_faster(query: torch.Tensor, key: torch.Tensor, schedule: DilationSchedule, heads: Heads) -> bool:
    """Whether measurements would choose these kernels: for more than one pattern, and more than a few queries."""
    if query.device.type != "cuda" or query.shape[2] < 128 or not 64 <= query.shape[-1] <= 128:
        return False
    measured = FASTER_ON.get(torch.cuda.get_device_capability(query.device), ())
    if torch.version.hip or query.dtype not in measured:  # an AMD MI200 calls itself (9, 0) too
        return False
    return len(plan_launches(schedule, heads, key.shape[2])) > 1


def _covers(schedule: DilationSchedule, pattern: int, heads: Heads) -> bool:
    """Whether the pattern before `pattern` offers all keys of its own segment that any earlier one offers."""
    first = bool(schedule.window)
    (w, r), rate = schedule.patterns[pattern - 1], schedule.dilation_rates[pattern]
    if w % r or rate % r or schedule.segment_lengths[pattern] % r:
        return False
    if any(w % other for other in schedule.segment_lengths[first : pattern - 1]):
        return False
    return all(heads.offset(schedule, rate, j) % r == heads.offset(schedule, r, j) for j in range(heads.num_heads))


@lru_cache(maxsize=512)
def plan_launches(schedule: DilationSchedule, heads: Heads, reach: int) -> tuple[Launch, ...]:
    """What to launch for documents of up to `reach` tokens, longest pattern first, last what selects every query."""
    first, once, launches = bool(schedule.window), schedule.overlap == "once", []
    for i in reversed(range(len(schedule.patterns))):
        w, r = schedule.patterns[i]
        if first and i == 0:
            launches.append(Launch(reach, 1, local=True))
            continue
        after_window = once and first
        earlier = schedule.patterns[first:i] if once else ()
        inner = earlier[-1][0] if earlier and _covers(schedule, i, heads) else 0
        if inner >= reach and inner or after_window and schedule.dense_start >= reach:
            continue  # earlier patterns have offered all
        nested = inner and schedule.is_causal
        launches.append(
            Launch(
                min(w, reach), r, after_window=after_window, inner=min(inner, reach) if nested else 0,
                earlier=() if nested else tuple((min(x, MAX_TOKENS), y) for x, y in earlier),
            )
        )  # fmt: skip
    if schedule.num_sink_tokens and schedule.dilation_rates[0] > 1:
        launches.append(Launch(reach, 1, keys=False))
    return tuple(launches)


def _documents(ids: torch.Tensor, query_offset: int, queries: int) -> torch.Tensor:
    """(batch row, start, stop) of each document that has a query among those given, [documents, 3] on the CPU."""
    position, _ = document_positions(ids)
    starts = (position == 0).nonzero()
    lines = torch.cat([starts, ids[starts[:, 0], starts[:, 1]][:, None].long()], dim=1).cpu()
    stops = torch.full((len(lines),), ids.shape[1])
    same_row = lines[1:, 0] == lines[:-1, 0]
    stops[:-1][same_row] = lines[1:, 1][same_row]
    documents = torch.stack([lines[:, 0], lines[:, 1], stops], dim=1)[lines[:, 2] >= 0]
    asked = (documents[:, 1] < query_offset + queries) & (documents[:, 2] > query_offset)
    return documents[asked]


def _repeat(lines: torch.Tensor, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each line `counts` times, and the number of the copy."""
    index = torch.repeat_interleave(torch.arange(len(lines)), counts)
    first = torch.cumsum(counts, 0) - counts
    return lines[index], torch.arange(len(index)) - first[index]


class Rows:
    """Where the programs of a launch lie: whole rows of the batch, or documents by a table.

    The table has a line (batch row, start and length of the document, segment, tile) for each tile of a head.
    """

    def __init__(self, query, key, document_ids, query_offset: int):
        self.batch, self.queries, self.length = len(query), query.shape[2], key.shape[2]
        self.query_offset, self.device = query_offset, query.device
        self.documents = None if document_ids is None else _documents(document_ids, query_offset, self.queries)
        self.reach = self.length
        if self.documents is not None:
            self.reach = int((self.documents[:, 2] - self.documents[:, 1]).max()) if len(self.documents) else 0

    def of(self, w: int, r: int, size: int, of_keys: bool) -> dict:
        """Arguments of the kernels: tiles of `size` rows of queries, or of all the keys of their segments."""
        if self.documents is not None:
            return self._table(w, r, size, of_keys)
        first, last = self.query_offset // w, (self.query_offset + self.queries - 1) // w
        rows = -(-min(w, self.length if of_keys else self.queries) // r)
        segments, tiles = last - first + 1, -(-rows // size)
        return self._arguments(self.batch * segments * tiles, first, segments, tiles, None)

    def of_sinks(self, num_sinks: int, size: int) -> dict:
        """Tiles of `size` sinks of every document."""
        tiles = -(-min(num_sinks, self.reach) // size)
        if self.documents is None:
            return self._arguments(self.batch * tiles, 0, 1, tiles, None)
        lengths = (self.documents[:, 2] - self.documents[:, 1])[:, None]
        lines = torch.cat([self.documents[:, :2], lengths, torch.zeros_like(lengths)], dim=1)
        return self._finish(*_repeat(lines, torch.full((len(lines),), tiles)))

    def _table(self, w, r, size, of_keys):
        row, start, stop = self.documents.T
        first = (self.query_offset - start).clamp(min=0)
        last = torch.minimum(stop, torch.tensor(self.query_offset + self.queries)) - start
        length = stop - start
        segments = (last - 1) // w - first // w + 1
        lines, number = _repeat(torch.stack([row, start, length, first // w, first, last], dim=1), segments)
        row, start, length, segment, first, last = lines.T
        segment = segment + number
        begin, end = segment * w, (segment + 1) * w
        span = torch.minimum(end, length) - begin
        if not of_keys:
            span = torch.minimum(end, last) - torch.maximum(begin, first)
        counts = (span + r * size - 1) // (r * size)
        return self._finish(*_repeat(torch.stack([row, start, length, segment], dim=1), counts), not of_keys)

    def _finish(self, lines, tile, heavy_last=False):
        order = torch.argsort(tile, stable=True, descending=heavy_last)
        table = torch.cat([lines, tile[:, None]], dim=1)[order].to(torch.int32).contiguous()
        return self._arguments(len(table), 0, 1, 1, table.to(self.device))

    def _arguments(self, entries, first_segment, segments, tiles, table):
        return {
            "entries": entries, "first_segment": first_segment, "segments": segments, "tiles": tiles, "TABLE": table,
            "PACKED": table is not None,
        }  # fmt: skip


def start_kernel(kernel, programs: int, arguments: dict, device: torch.device, shape: Tiles) -> None:
    """Starts `programs` of a kernel."""
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[(programs,)](**arguments, num_warps=shape.num_warps, num_stages=shape.num_stages)


class TritonCall:
    """One forward or backward: the tensors and what all of its launches have in common."""

    def __init__(self, query, key, value, document_ids, query_offset, schedule, heads: Heads, scale):
        if key.shape[2] > MAX_TOKENS:
            raise ValueError(f"`backend='triton'` takes up to {MAX_TOKENS} tokens, got {key.shape[2]}.")
        self.query, self.key, self.value = (in_rows(x) for x in (query, key, value))
        self.schedule, self.heads, self.scale = schedule, heads, scale
        self.rows = Rows(query, key, document_ids, query_offset)
        self.width = query.shape[-1]
        self.launches = plan_launches(schedule, heads, self.rows.reach)
        self.selects_all = bool(self.launches) and self.launches[-1].r == 1
        self.common = {
            "batch": len(query), "heads": heads.num_heads, "groups": heads.num_kv_heads, "head_start": heads.first,
            "total_heads": heads.total or heads.num_heads, "queries": query.shape[2], "length": key.shape[2],
            "query_offset": query_offset, "sinks": min(schedule.num_sink_tokens, MAX_TOKENS),
            "scale": scale * 1.4426950408889634,  # log2(e): the kernels use powers of two
            "CAUSAL": schedule.is_causal, "D": self.width, "BD": max(16, 1 << (self.width - 1).bit_length()),
            "INTERPRETED": query.device.type == "cpu", **_strides("q", self.query), **_strides("k", self.key),
            **_strides("v", self.value),
        }  # fmt: skip

    def tiles(self, kernel: str) -> Tiles:
        return choose_tiles(kernel, self.common["BD"], self.query.dtype)

    def run(self, kernel, programs: int, shape: Tiles, strided: tuple, step: int, **arguments) -> None:
        """Launches `kernel`; `strided` are the further tensors of which it reads tiles at up to `step` tokens."""
        if not programs:
            return
        if programs >= 2**31:
            raise ValueError(f"`backend='triton'` would start {programs} programs at once; CUDA starts below 2**31.")
        stride = max(x.stride(2) for x in (self.query, self.key, self.value, *strided))
        arguments = self.common | vars(shape) | arguments
        arguments["WIDE"] = max(shape.BM, shape.BN) * step * stride >= 2**31
        start_kernel(kernel, programs, {name: arguments[name] for name in kernel.arg_names}, self.query.device, shape)

    def pattern(self, launch: Launch) -> dict:
        """What a launch of a pattern tells its kernel."""
        return {
            "segment_length": launch.w, "rate": launch.r, "window": min(self.schedule.window, MAX_TOKENS),
            "dense": min(self.schedule.dense_start, MAX_TOKENS), "inner": launch.inner,
            "CONTIGUOUS": self.schedule.head_offsets == "contiguous", "LOCAL": launch.local,
            "AFTER_WINDOW": launch.after_window, "INNER": launch.inner > 0, "KEYS": launch.keys,
            "EARLIER_W": tuple(w for w, _ in launch.earlier), "EARLIER_R": tuple(r for _, r in launch.earlier),
        }  # fmt: skip

    def offsets(self, rate: int) -> int:
        """The most offsets that the query heads of one key/value head have in a pattern."""
        heads, share = self.heads, self.heads.per_group
        groups = (range(j, j + share) for j in range(0, heads.num_heads, share))
        return max(len({heads.offset(self.schedule, rate, j) for j in group}) for group in groups)


def in_rows(x: torch.Tensor) -> torch.Tensor:
    """Kernels want each row's channels next to each other (that of CPUs would read others' memory without a word); the
    rows may lie at any distance."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(name: str, x: torch.Tensor) -> dict:
    return dict(zip((f"{name}_batch", f"{name}_head", f"{name}_token"), x.stride()))


def triton_forward(call: TritonCall, out: torch.Tensor, lse: torch.Tensor) -> None:
    """Fills out [B, H, Q, D] and lse [B, H, Q] (float32), which may be uninitialised."""
    from .triton_kernels import forward_kernel

    last = len(call.launches) - 1
    whole = call.selects_all and call.rows.documents is None
    if not whole or last > 0:
        lse.fill_(-torch.inf)
    if not whole:
        out.zero_()
    source = out
    if last > 0 and out.dtype != torch.float32 or not call.selects_all:
        make = torch.empty_like if call.selects_all else torch.zeros_like
        source = make(out, dtype=torch.float32)
    for index, launch in enumerate(call.launches):
        tiles, final = call.tiles("forward"), index == last
        where = call.rows.of(launch.w, launch.r, tiles.BM, False)
        call.run(
            forward_kernel, where["entries"] * call.common["heads"], tiles, (out,), launch.r, **where,
            **call.pattern(launch), **_strides("o", out), Q=call.query, K=call.key, V=call.value, SOURCE=source,
            TARGET=out if final and call.selects_all else source, LSE=lse, FIRST=index == 0,
            SINKS=final and call.schedule.num_sink_tokens > 0, ZEROS=call.schedule.padding == "zeros",
        )  # fmt: skip
    if not call.selects_all:
        out.copy_(source)


def triton_backward(call: TritonCall, grad, out, lse) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value, in their dtype; out and lse are those of the forward."""
    from .triton_kernels import query_grad_kernel, row_sums_kernel

    grad, out = in_rows(grad), in_rows(out)
    sums = torch.empty_like(lse)
    tiles = call.tiles("row_sums")
    blocks = -(-call.common["queries"] // tiles.BM)
    programs = blocks * call.common["batch"] * call.common["heads"]
    call.run(
        row_sums_kernel, programs, tiles, (grad, out), 1, GRAD=grad, OUT=out, SUMS=sums, tiles=blocks,
        **_strides("g", grad), **_strides("o", out),
    )  # fmt: skip
    shared = {
        "Q": call.query, "K": call.key, "V": call.value, "GRAD": grad, "LSE": lse, "SUMS": sums, "factor": call.scale,
        **_strides("g", grad),
    }  # fmt: skip
    query_grad = torch.zeros_like(call.query, dtype=torch.float32)
    key_grad = torch.zeros_like(call.key, dtype=torch.float32)
    value_grad = torch.zeros_like(call.key, dtype=torch.float32)
    for index, launch in enumerate(call.launches):
        tiles = call.tiles("query_grad")
        where = call.rows.of(launch.w, launch.r, tiles.BM, False)
        call.run(
            query_grad_kernel, where["entries"] * call.common["heads"], tiles, (grad, query_grad), launch.r, **where,
            **call.pattern(launch), **_strides("o", query_grad), **shared, SOURCE=query_grad, TARGET=query_grad,
            FIRST=False, SINKS=index == len(call.launches) - 1 and call.schedule.num_sink_tokens > 0,
        )  # fmt: skip
        if launch.keys:
            _key_grads(call, launch, shared, key_grad, value_grad)
    if call.schedule.num_sink_tokens:
        _sink_grads(call, shared, key_grad, value_grad)
    return tuple(g.to(call.query.dtype) for g in (query_grad, key_grad, value_grad))


def _key_grads(call: TritonCall, launch: Launch, shared: dict, key_grad, value_grad) -> None:
    from .triton_key_kernels import key_grad_kernel

    tiles, offsets = call.tiles("key_grad"), call.offsets(launch.r)
    where = call.rows.of(launch.w, launch.r, tiles.BN, True)
    call.run(
        key_grad_kernel, where["entries"] * call.common["groups"] * offsets, tiles, (shared["GRAD"], key_grad),
        launch.r, **where, **call.pattern(launch), **shared, **_strides("d", key_grad), DK=key_grad, DV=value_grad,
        offsets=offsets,
    )  # fmt: skip


def _sink_grads(call: TritonCall, shared: dict, key_grad, value_grad) -> None:
    """Every query sees the sinks: stretches of them are summed apart, then the sums."""
    from .triton_key_kernels import add_sinks_kernel, sink_grad_kernel

    tiles, groups = call.tiles("sink_grad"), call.common["groups"]
    where = call.rows.of_sinks(call.schedule.num_sink_tokens, tiles.BN)
    entries = where["entries"]
    stretches = -(-min(call.rows.reach, call.common["queries"]) // 1024)
    chunks = max(1, min(256, stretches, 4096 // max(1, entries * groups)))
    parts = call.query.new_empty(2, chunks, groups, entries, tiles.BN, call.common["BD"], dtype=torch.float32)
    arguments = where | shared | _strides("d", key_grad)
    arguments |= {"PART_K": parts[0], "PART_V": parts[1], "DK": key_grad, "DV": value_grad, "chunks": chunks}
    call.run(sink_grad_kernel, chunks * groups * entries, tiles, (shared["GRAD"],), 1, **arguments)
    call.run(add_sinks_kernel, groups * entries, tiles, (key_grad,), 1, **arguments)
