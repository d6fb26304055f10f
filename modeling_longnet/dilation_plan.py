"""Cuts dilated attention into blocks that ordinary attention kernels can run: no mask, or a plain causal square.

A segment of a pattern, seen by one head, is a set of rows at equal distances, so its queries and keys are strided
views. Under `overlap="once"` a key that an earlier pattern offered already is left out. What remains is a staircase,
because the earlier pattern's segments are whole intervals around the query:

        earlier segments of 4, this pattern's segment of 12:     query 0..3    . . .
                                                                 query 4..7    A . .      A, B: unmasked rectangles
                                                                 query 8..11   B B .

With several rates the rows fall into residue classes (modulo the least common multiple) that an earlier pattern either
covers or not; each pair of classes gets its own staircase. Sink tokens are a block of their own and are left out of
every other. A sliding window is a causal square per window plus the square before it with time reversed, behind a dense
start; or, for kernels that take a mask, bands of n queries and the n + W - 1 keys that their windows of W reach:

    query 0   1 1 1 1 . .        n = 3, W = 4
    query 1   . 1 1 1 1 .
    query 2   . . 1 1 1 1

Letters: H query heads, G key/value heads, w segment length, r dilation rate, s offset of a head, i pattern index.
"""

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from .dilation_schedule import DilationSchedule, Heads


SINKS = -1  # pattern index of the blocks that hold the sink tokens


@dataclass(frozen=True)
class Rows:
    """Positions start, start + step, ..., `count` of them."""

    start: int
    step: int
    count: int

    def shift(self, distance: int) -> "Rows":
        return Rows(self.start + distance, self.step, self.count)


@dataclass(frozen=True)
class Region:
    """Queries against keys: `"full"`, `"causal"` (square, key index <= query index), `"reversed"` (square, key index >=
    query index), `"band"` (of `plan_bands`: n queries, n + W - 1 keys, query index <= key index < query index + W)
    or `"zeros"` (`keys.count` zero keys that exist only in the softmax)."""

    kind: str
    queries: Rows
    keys: Rows

    def shift(self, distance: int) -> "Region":
        return Region(self.kind, self.queries.shift(distance), self.keys.shift(distance))


@dataclass(frozen=True)
class Block:
    """One kernel call: a region, repeated `repeats` times at a distance of `stride` positions, for some heads.

    `heads` and `kv_heads` are equally long, or all heads in a band; `fresh` says that no earlier block touched these
    queries.
    """

    pattern: int
    offset: int
    heads: slice
    kv_heads: slice
    region: Region
    repeats: int
    stride: int
    fresh: bool


def _first_row(base: int, step: int, position: int) -> int:
    """The first row m >= 0 with base + step * m >= position."""
    return max(0, -(-(position - base) // step))


def _causal_regions(
    queries: tuple[int, int], keys: tuple[int, int], query_base: int, key_base: int, step: int, distance: int = 0
) -> Iterator[Region]:
    """Rows of two lattices within two intervals of positions, key <= query - distance, in rectangles and squares."""
    m0, m1 = (_first_row(query_base, step, p) for p in queries)
    k0, k1 = (_first_row(key_base, step, p) for p in keys)
    lag = -((query_base - key_base - distance) // step)  # query row m sees key rows up to m - lag
    m0 = max(m0, k0 + lag)
    k1 = min(k1, m1 - lag)
    if m0 >= m1 or k0 >= k1:
        return

    def region(kind, query_row, num_queries, key_row, num_keys):
        return Region(
            kind,
            Rows(query_base + step * query_row, step, num_queries),
            Rows(key_base + step * key_row, step, num_keys),
        )

    first = m0 - lag  # the last key that the first query sees
    if m1 - m0 == 1 or k1 <= first + 1:
        yield region("full", m0, m1 - m0, k0, min(k1, first + 1) - k0)
        return
    size = k1 - first
    yield region("causal", m0, size, first, size)
    if m0 + size < m1:
        yield region("full", m0 + size, m1 - m0 - size, first, size)
    if first > k0:
        yield region("full", m0, m1 - m0, k0, first - k0)


def _window_regions(start: int, window: int, queries: tuple[int, int], first_key: int) -> Iterator[Region]:
    """The sliding window of the queries in [start, start + window): its own square, and the reversed one before it."""
    a, b = max(start, queries[0]), min(start + window, queries[1])
    yield from _causal_regions((a, b), (max(start, first_key), b), start, start, 1)
    count, everyone = b - a, max(b - window, first_key, 0)  # keys from `everyone` on are seen by all these queries
    if everyone < start:
        yield Region("full", Rows(a, 1, count), Rows(everyone, 1, start - everyone))
    lowest = max(a - window + 1, first_key, 0)
    if lowest < b - window:
        # Query a + i sees keys from a - window + 1 + i on. Those before `lowest` are cut off: a square at the end of
        # the triangle, and the queries before it see all of its keys.
        skipped = lowest - (a - window + 1)
        size = b - window - lowest
        yield Region("reversed", Rows(a + skipped, 1, size), Rows(lowest, 1, size))
        if skipped:
            yield Region("full", Rows(a, 1, skipped), Rows(lowest, 1, size))


def band_rows(window: int, per_group: int, backward: bool = False) -> int:
    """Queries of a band of W = `window` that `per_group` query heads share, 0 where triangles are faster.

    Few queries see few keys in vain, many fill a kernel and have few gradients to add. Measured on a CPU: forward and
    backward together, with as many, take 0.79 of the time of two triangles (or one square band, W up to 256) where
    three heads share W = 256, 0.68 at 512, 0.88 at 1,024; for each head alone 0.88 at 512, and above 1 at 1,024. A
    forward alone, with 64 queries, takes 0.65 where three heads share W = 256, 0.77 at 768, 0.88 at 1,536, 0.99 at
    3,072; for each head alone 0.63 at 512, 0.99 at 1,536.
    """
    if not backward:
        return min(window, 64)
    if per_group == 1:
        return min(window, 256) if window <= 512 else 0
    return min(window, max(64, min(256, window // 4)))


def _even_parts(start: int, stop: int, length: int) -> Iterator[tuple[int, int, int]]:
    """[start, stop) in parts of `length` and one shorter: (where it begins, its length, how many follow it alike)."""
    repeats, rest = divmod(stop - start, length) if start < stop else (0, 0)
    if repeats:
        yield start, length, repeats
    if rest:
        yield stop - rest, rest, 1


class _Planner:
    """Regions of one document: queries at positions [q0, q1), keys at positions [0, n)."""

    def __init__(self, schedule: DilationSchedule, queries: tuple[int, int], length: int, rows: int):
        self.schedule = schedule
        self.band_rows = rows
        self.queries = queries
        self.length = min(length, queries[1]) if schedule.is_causal else length
        self.first_key = schedule.num_sink_tokens

    def regions(self, pattern: int, offsets: tuple[int, ...]) -> Iterator[tuple[Region, int, int, bool]]:
        """(region, repeats, stride, fresh) of one pattern; `offsets` are those of the head in patterns 0..pattern."""
        if pattern == 0 and self.schedule.window:
            yield from self._repeated_windows()
            return
        w = self.schedule.segment_lengths[pattern]
        q0, q1 = self.queries
        if q1 - q0 == 1 and q0 % w % self.schedule.dilation_rates[pattern] != offsets[-1]:
            return  # a decoding step, which most offsets do not select
        step, earlier = self._earlier_patterns(pattern, offsets)
        after_window = pattern > 0 and self.schedule.overlap == "once"
        # Segments that lie inside everything, and behind all that makes the first ones special.
        lowest = max(q0, self.first_key, self.schedule.dense_start if after_window else 0)
        whole = range(-(-lowest // w), min(q1, self.length) // w)
        alike = all(w % earlier_w == 0 for earlier_w, _, _ in earlier) and len(whole) > 0
        segment = q0 // w
        while segment * w < q1:
            repeats = len(whole) if alike and segment == whole.start else 1
            for index, region in enumerate(self._segment_regions(pattern, segment * w, offsets[-1], step, earlier)):
                yield region, repeats, w, pattern == 0 and index == 0
            segment += repeats

    def _repeated_windows(self) -> Iterator[tuple[Region, int, int, bool]]:
        """The dense start of the text, then window by window."""
        window, dense, (q0, q1) = self.schedule.window, self.schedule.dense_start, self.queries
        start = _causal_regions((q0, min(q1, dense)), (self.first_key, min(q1, dense)), 0, 0, 1)
        for index, region in enumerate(start):
            yield region, 1, window, index == 0
        # From here on no sink is among the keys of a query.
        stop = min(q1, max(q0, dense, self.first_key + window - 1)) if self.band_rows else q1
        yield from self._windows(stop)
        for first, count, repeats in _even_parts(stop, q1, self.band_rows):
            keys = Rows(first - window + 1, 1, window + count - 1)
            yield Region("band", Rows(first, 1, count), keys), repeats, self.band_rows, True

    def _windows(self, stop: int) -> Iterator[tuple[Region, int, int, bool]]:
        """Of the queries behind the dense start and before `stop`, window by window."""
        window, dense, q0 = self.schedule.window, self.schedule.dense_start, self.queries[0]
        lowest = max(q0, self.first_key + window) - dense  # then no sink is among the keys
        whole = range(max(0, -(-lowest // window)), (stop - dense) // window)
        square = max(0, q0 - dense) // window
        while q0 < stop and dense + square * window < stop:
            repeats = len(whole) if len(whole) > 0 and square == whole.start else 1
            regions = _window_regions(dense + square * window, window, (q0, stop), self.first_key)
            for index, region in enumerate(regions):
                yield region, repeats, window, index == 0
            square += repeats

    def _earlier_patterns(self, pattern: int, offsets: tuple[int, ...]) -> tuple[int, list[tuple[int, int, int]]]:
        """The step of the residue classes and the (w, r, s) of the earlier patterns that may share keys with this."""
        rate = self.schedule.dilation_rates[pattern]
        if self.schedule.overlap == "count":
            return rate, []
        earlier = [(w, r, offsets[i]) for i, w, r in self.schedule.dilated_patterns if i < pattern]
        return math.lcm(rate, *(r for _, r, _ in earlier)), earlier

    def _segment_regions(self, pattern, start, offset, step, earlier) -> Iterator[Region]:
        w, r = self.schedule.patterns[pattern]
        stop = min(start + w, self.length)
        bases = [start + s for s in range(offset, step, r)]
        low, high = max(start, self.queries[0]), min(stop, self.queries[1])
        for query_base in bases:
            if _first_row(query_base, step, low) >= _first_row(query_base, step, high):
                continue  # none of these queries: of a single one, nearly always
            for key_base in bases:
                for (a, b), covered in self._staircase(start, stop, query_base, key_base, earlier):
                    a, b = max(a, self.queries[0]), min(b, self.queries[1])
                    yield from self._block_regions((start, stop), (a, b), covered, query_base, key_base, step, pattern)
        if self.schedule.padding == "zeros":
            yield from self._zero_regions(start, stop, offset, w, r)

    def _staircase(self, start, stop, query_base, key_base, earlier):
        """Yields intervals of queries with the interval of keys that earlier patterns have offered to them already."""
        kept = []
        for w, r, s in earlier:
            regular = w % r == 0  # then whether a class is covered does not depend on the segment
            if regular and not (query_base % r == s and key_base % r == s):
                continue
            kept.append((w, r, s, regular))
        widest = [w for w, _, _, regular in kept if regular]
        kept = [k for k in kept if not any(w > k[0] and w % k[0] == 0 for w in widest)]
        cuts = {start, stop}
        for w, *_ in kept:
            cuts.update(range(-(-start // w) * w, stop, w))
        cuts = sorted(c for c in cuts if start <= c <= stop)
        previous = None
        for a, b in zip(cuts, cuts[1:]):
            spans = []
            for w, r, s, _ in kept:
                x = a // w * w
                if (query_base - x) % r == s and (key_base - x) % r == s:
                    spans.append((x, x + w))
            covered = (min(x for x, _ in spans), max(y for _, y in spans)) if spans else None
            if previous and previous[1] == covered:
                previous = ((previous[0][0], b), covered)
                continue
            if previous:
                yield previous
            previous = ((a, b), covered)
        if previous:
            yield previous

    def _block_regions(self, segment, queries, covered, query_base, key_base, step, pattern) -> Iterator[Region]:
        start, stop = segment
        first = max(start, self.first_key)
        distance = 0
        if self.schedule.overlap == "once" and pattern > 0:  # what the window offers is counted already
            distance = self.schedule.window
            queries = max(queries[0], self.schedule.dense_start), queries[1]
        if queries[0] >= queries[1]:
            return
        if self.schedule.is_causal:
            last = min(stop, covered[0]) if covered else stop
            yield from _causal_regions(queries, (first, last), query_base, key_base, step, distance)
            return
        spans = [(first, min(stop, covered[0])), (max(first, covered[1]), stop)] if covered else [(first, stop)]
        m0, m1 = (_first_row(query_base, step, p) for p in queries)
        for low, high in spans:
            k0, k1 = _first_row(key_base, step, low), _first_row(key_base, step, high)
            if m0 < m1 and k0 < k1:
                rows = Rows(query_base + step * m0, step, m1 - m0)
                yield Region("full", rows, Rows(key_base + step * k0, step, k1 - k0))

    def _zero_regions(self, start, stop, offset, w, r) -> Iterator[Region]:
        base = start + offset
        m0, m1 = (_first_row(base, r, p) for p in (max(start, self.queries[0]), min(stop, self.queries[1])))
        zeros = -(-min(w, self.length) // r) - _first_row(base, r, stop)
        if m0 < m1 and zeros > 0:
            yield Region("zeros", Rows(base + r * m0, r, m1 - m0), Rows(base, r, zeros))

    def sink_regions(self) -> Iterator[Region]:
        q0, q1 = self.queries
        sinks = min(self.first_key, self.length)
        if self.schedule.is_causal:
            yield from _causal_regions((q0, q1), (0, sinks), 0, 0, 1)
        elif sinks:
            yield Region("full", Rows(q0, 1, q1 - q0), Rows(0, 1, sinks))


def _progression(values: list[int]) -> slice:
    step = values[1] - values[0] if len(values) > 1 else 1
    assert values == list(range(values[0], values[-1] + 1, step)), "heads of one offset are equally spaced"
    return slice(values[0], values[-1] + 1, step)


@lru_cache(maxsize=512)
def _head_groups(
    schedule: DilationSchedule, patterns: range, heads: Heads
) -> tuple[tuple[tuple[int, ...], slice, slice], ...]:
    """Heads with the same offsets in `patterns` whose key/value heads are equally spaced: no copy is ever needed."""
    members = defaultdict(list)
    for j in range(heads.num_heads):
        offsets = tuple(heads.offset(schedule, schedule.dilation_rates[i], j) for i in patterns)
        members[offsets, j % heads.per_group].append(j)
    return tuple(
        (offsets, _progression(alike), _progression([j // heads.per_group for j in alike]))
        for (offsets, _), alike in members.items()
    )


def iterate_blocks(
    schedule: DilationSchedule, heads: Heads, queries: tuple[int, int], length: int, rows: int
) -> Iterator[Block]:
    """The blocks of `plan_blocks`; `rows`, if not 0: queries of a band, where a sliding window is cut into such."""
    planner = _Planner(schedule, queries, length, rows)
    for i in range(len(schedule.patterns)):
        relevant = range(i + 1) if schedule.overlap == "once" else range(i, i + 1)
        regions = {}
        for offsets, own, kv_heads in _head_groups(schedule, relevant, heads):
            if offsets not in regions:
                regions[offsets] = list(planner.regions(i, offsets))
            for region, repeats, stride, fresh in regions[offsets]:
                if region.kind != "band":
                    yield Block(i, offsets[-1], own, kv_heads, region, repeats, stride, fresh)
                elif own.start == 0:
                    yield Block(
                        i, 0, slice(0, heads.num_heads), slice(0, heads.num_kv_heads), region, repeats, stride, fresh
                    )
    if schedule.num_sink_tokens:
        for _, own, kv_heads in _head_groups(schedule, range(0), heads):
            for region in planner.sink_regions():
                yield Block(SINKS, 0, own, kv_heads, region, 1, 0, False)


@lru_cache(maxsize=512)
def plan_blocks(
    schedule: DilationSchedule, heads: Heads, query_start: int, query_stop: int, length: int
) -> tuple[Block, ...]:
    """The blocks of one document, queries at positions [query_start, query_stop), keys at positions [0, length).

    Every (query, key) pair that the definition counts m times lies in exactly m blocks. Pattern 0 comes first.
    """
    return tuple(iterate_blocks(schedule, heads, (query_start, query_stop), length, 0))


@lru_cache(maxsize=512)
def plan_bands(
    schedule: DilationSchedule, heads: Heads, query_start: int, query_stop: int, length: int, backward: bool = False
) -> tuple[Block, ...]:
    """`plan_blocks` with a sliding window as bands of all heads, for kernels that take a mask. What a forward leaves
    does not tell its plan, so that a backward may have another."""
    has_bands = schedule.window and query_stop - query_start > 1
    rows = band_rows(schedule.window, heads.per_group, backward) if has_bands else 0
    return tuple(iterate_blocks(schedule, heads, (query_start, query_stop), length, rows))
