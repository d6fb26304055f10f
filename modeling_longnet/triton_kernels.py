"""Triton kernels of dilated attention that own queries: forward, row sums for the backward, gradient of the queries.

One launch per pattern, longest first. A program owns some rows of one segment that one head selects, and starts from
the (out, log-sum-exp) that the longer patterns left for them: running maximum m = lse, running sum z = 1, accumulator
acc = out. So nothing is gathered and nothing is merged. No two programs write the same row, so nothing depends on
their order.

A segment seen by one head is a *lattice*: rows 0, 1, ... at positions origin + rate * row of the document, a matrix of
row stride rate * stride, read in place. What a query sees of it is a range of lattice rows, [low, limit), unless
`overlap="once"` leaves out keys of patterns that are not nested: then ids of segments are compared (EARLIER_W,
EARLIER_R). Key tiles that all rows of a program see whole take the loop without masks.

Letters: B batch, H query heads, G key/value heads, D head dimension, BM rows of queries and BN rows of keys in a tile,
BD D filled up to a power of two. Positions and lattice rows are int32; every address starts from an int64 base.

Imported only when the backend "triton" runs; without Triton the functions below are plain and never called.
"""

from __future__ import annotations


try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None


# Counts that change from call to call: specialised on their divisibility they would compile again and again.
COUNTS = (
    "batch queries length query_offset entries first_segment segments tiles segment_length sinks window dense inner "
    "head_start total_heads chunks"
).split()


def jit(function):
    """`triton.jit`, where there is Triton."""
    if triton is None:
        return function
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    return triton.jit(function, do_not_specialize=[name for name in COUNTS if name in names])


@jit
def rows_below(distance, rate):
    """How many lattice rows have rate * row < distance."""
    return tl.maximum(distance + rate - 1, 0) // rate


@jit
def head_offset(head, total_heads, rate, CONTIGUOUS: tl.constexpr):
    """s of a head, counted over all heads of the layer."""
    if CONTIGUOUS:
        return head // ((total_heads + rate - 1) // rate)
    else:
        return head % rate


@jit
def find_tile(
    entry, TABLE, batch, length, first_segment, segments, tiles, PACKED: tl.constexpr, HEAVY_LAST: tl.constexpr
):
    """(batch row, start and length of the document, segment, tile within it): of the table, or of whole rows."""
    if PACKED:
        line = TABLE + 5 * entry
        return (
            tl.load(line).to(tl.int64),
            tl.load(line + 1),
            tl.load(line + 2),
            tl.load(line + 3),
            tl.load(line + 4),
        )
    else:
        places = batch * segments
        tile = entry // places
        if HEAVY_LAST:  # under a causal mask the last rows see most
            tile = tiles - 1 - tile
        row = ((entry % places) // segments).to(tl.int64)
        return row, 0, length, first_segment + entry % segments, tile


@jit
def find_lattice(segment, segment_length, s, start, length, query_offset, queries, rate):
    """(origin and rows of the lattice, the first row that is a query, the end of those)."""
    origin = segment * segment_length + s
    rows = rows_below(tl.minimum(segment_length - s, length - origin), rate)
    first_row = rows_below(query_offset - start - origin, rate)
    return origin, rows, first_row, tl.minimum(rows, rows_below(query_offset + queries - start - origin, rate))


@jit
def find_queries(pid, TABLE, batch, head_start, total_heads, queries, length, query_offset, entries, first_segment,
                 segments, tiles, segment_length, rate, CONTIGUOUS: tl.constexpr, PACKED: tl.constexpr,
                 BM: tl.constexpr):  # fmt: skip
    """What the program owns: (batch row, head, start and length of the document, origin and rows of the lattice, its
    first row, the end of the rows that are queries)."""
    b, start, length, segment, tile = find_tile(
        pid % entries, TABLE, batch, length, first_segment, segments, tiles, PACKED, True
    )
    head = head_start + pid // entries
    s = head_offset(head, total_heads, rate, CONTIGUOUS)
    origin, rows, first_row, row_stop = find_lattice(
        segment, segment_length, s, start, length, query_offset, queries, rate
    )
    return b, head, start, length, origin, rows, first_row + tile * BM, row_stop


@jit
def load_rows(base, first, stop, step, D: tl.constexpr, ROWS: tl.constexpr, BD: tl.constexpr, MASKED: tl.constexpr,
              WIDE: tl.constexpr):  # fmt: skip
    """[ROWS, BD] of a matrix with D columns; rows from `stop` on are zeros if MASKED, and must exist if not."""
    row = tl.arange(0, ROWS)
    channel = tl.arange(0, BD)
    offset = row
    if WIDE:
        offset = row.to(tl.int64)
    pointers = base + tl.cast(first, tl.int64) * step + (offset * step)[:, None] + channel[None, :]
    if MASKED:
        inside = (first + row < stop)[:, None] & (channel < D)[None, :]
        return tl.load(pointers, mask=inside, other=0.0)
    else:
        if D < BD:
            return tl.load(pointers, mask=(channel < D)[None, :], other=0.0)
        else:
            return tl.load(pointers)


@jit
def store_rows(base, first, stop, step, values, D: tl.constexpr, ROWS: tl.constexpr, BD: tl.constexpr,
               WIDE: tl.constexpr):  # fmt: skip
    row = tl.arange(0, ROWS)
    channel = tl.arange(0, BD)
    offset = row
    if WIDE:
        offset = row.to(tl.int64)
    pointers = base + tl.cast(first, tl.int64) * step + (offset * step)[:, None] + channel[None, :]
    inside = (first + row < stop)[:, None] & (channel < D)[None, :]
    tl.store(pointers, values.to(base.dtype.element_ty), mask=inside)


@jit
def load_lse(pointers, inside):
    """Log-sum-exps in powers of two; inf, which leaves no probabilities, where there is no query or it sees nothing."""
    lse = tl.load(pointers, mask=inside, other=float("inf")) * 1.4426950408889634
    return tl.where(lse == float("-inf"), float("inf"), lse)


@jit
def product(a, b, INTERPRETED: tl.constexpr):
    """a @ b, added up in float32. The interpreter multiplies the bit patterns of bfloat16, hence the cast there."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, input_precision="tf32x3")


@jit
def window_start(p, window, dense):
    """The first key of the sliding window of the query at p."""
    return tl.where(p >= dense, p - window + 1, 0)


@jit
def key_limit(p, origin, rate, rows, window, dense, inner, CAUSAL: tl.constexpr, AFTER_WINDOW: tl.constexpr,
              INNER: tl.constexpr):  # fmt: skip
    """The first lattice row that the query at p no longer sees."""
    if CAUSAL:
        limit = p + 1
        if INNER:  # an earlier pattern offered all keys of its own segment already
            limit = tl.minimum(limit, p // inner * inner)
        if AFTER_WINDOW:  # so did the window, and the dense start of the text
            limit = tl.minimum(limit, window_start(p, window, dense))
        return tl.minimum(rows_below(limit - origin, rate), rows)
    else:
        return p * 0 + rows


@jit
def hide_earlier(seen, p, k, head, total_heads, CONTIGUOUS: tl.constexpr, EARLIER_W: tl.constexpr,
                 EARLIER_R: tl.constexpr):  # fmt: skip
    """`seen`, less the pairs of queries [M, 1] and keys [1, N] (or the reverse) that an earlier pattern offered."""
    for i in tl.static_range(len(EARLIER_W)):
        s = head_offset(head, total_heads, EARLIER_R[i], CONTIGUOUS)
        of_query = tl.where((p % EARLIER_W[i]) % EARLIER_R[i] == s, p // EARLIER_W[i], -1)
        of_key = tl.where((k % EARLIER_W[i]) % EARLIER_R[i] == s, k // EARLIER_W[i], -2)
        seen = seen & (of_query != of_key)
    return seen


@jit
def key_ranges(p, row, row_stop, origin, rate, rows, sinks, window, dense, inner, CAUSAL: tl.constexpr,
               LOCAL: tl.constexpr, AFTER_WINDOW: tl.constexpr, INNER: tl.constexpr, ALL_MASKED: tl.constexpr,
               BM: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """For the queries of a tile, at positions p: (begin, a, b, stop, low, limit). Keys of [a, b) are seen by all.

    [begin, a) and [a, b) are whole tiles; the keys before `begin` are sinks or seen by none, as are those from `stop`.
    Each query sees the keys of its own [low, limit), of which `low` counts if LOCAL.
    """
    first = origin + rate * row
    last = origin + rate * (tl.minimum(row + BM, row_stop) - 1)
    begin = rows_below(sinks - origin, rate)
    stop = key_limit(last, origin, rate, rows, window, dense, inner, CAUSAL, AFTER_WINDOW, INNER)
    a = begin
    low = p
    if LOCAL:
        low = window_start(p, window, dense)
        begin = tl.maximum(begin, window_start(first, window, dense))
        ragged = tl.minimum(window_start(last, window, dense), stop) - begin
        a = begin + rows_below(ragged, BN) * BN
    b = a
    if not ALL_MASKED:
        free = key_limit(first, origin, rate, rows, window, dense, inner, CAUSAL, AFTER_WINDOW, INNER)
        b = a + tl.maximum(free - a, 0) // BN * BN
    limit = key_limit(p, origin, rate, rows, window, dense, inner, CAUSAL, AFTER_WINDOW, INNER)
    return begin, a, b, stop, low, limit


@jit
def visible_keys(column, low, limit, p, origin, rate, head, total_heads, CONTIGUOUS: tl.constexpr, LOCAL: tl.constexpr,
                 EARLIER_W: tl.constexpr, EARLIER_R: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """Which keys of a tile each query sees, [BM, BN]."""
    columns = column + tl.arange(0, BN)
    seen = columns[None, :] < limit[:, None]
    if LOCAL:
        seen = seen & (columns[None, :] >= low[:, None])
    if len(EARLIER_W) > 0:
        k = origin + rate * columns
        seen = hide_earlier(seen, p[:, None], k[None, :], head, total_heads, CONTIGUOUS, EARLIER_W, EARLIER_R)
    return seen


@jit
def attend_tile(q, m, z, acc, K, V, column, rows, k_step, v_step, scale, low, limit, p, origin, rate, head, total_heads,
                MASKED: tl.constexpr, CONTIGUOUS: tl.constexpr, LOCAL: tl.constexpr, EARLIER_W: tl.constexpr,
                EARLIER_R: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, WIDE: tl.constexpr,
                INTERPRETED: tl.constexpr):  # fmt: skip
    """One step of the running softmax, in powers of two: the state (m, z, acc) with one more tile of keys."""
    k = load_rows(K, column, rows, k_step, D, BN, BD, MASKED, WIDE)
    x = product(q, tl.trans(k), INTERPRETED) * scale
    if MASKED:
        seen = visible_keys(column, low, limit, p, origin, rate, head, total_heads, CONTIGUOUS, LOCAL, EARLIER_W,
                            EARLIER_R, BN)  # fmt: skip
        x = tl.where(seen, x, float("-inf"))
    larger = tl.maximum(m, tl.max(x, 1))
    shift = larger
    if MASKED:  # rows that have seen nothing so far
        shift = tl.where(larger == float("-inf"), 0.0, larger)
    e = tl.exp2(x - shift[:, None])
    shrink = tl.exp2(m - shift)
    v = load_rows(V, column, rows, v_step, D, BN, BD, MASKED, WIDE)
    acc = acc * shrink[:, None] + product(e.to(v.dtype), v, INTERPRETED)
    return larger, z * shrink + tl.sum(e, 1), acc


# Longer than other functions: one program, whose tiles would travel through each call.
@jit
def forward_kernel(Q, K, V, SOURCE, TARGET, LSE, TABLE, q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch,
                   v_head, v_token, o_batch, o_head, o_token, batch, heads, groups, head_start, total_heads, queries,
                   length, query_offset, entries, first_segment, segments, tiles, segment_length, rate, sinks, window,
                   dense, inner, scale, CAUSAL: tl.constexpr, CONTIGUOUS: tl.constexpr, LOCAL: tl.constexpr,
                   AFTER_WINDOW: tl.constexpr, INNER: tl.constexpr, EARLIER_W: tl.constexpr, EARLIER_R: tl.constexpr,
                   PACKED: tl.constexpr, FIRST: tl.constexpr, KEYS: tl.constexpr, SINKS: tl.constexpr,
                   ZEROS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                   WIDE: tl.constexpr, INTERPRETED: tl.constexpr):  # fmt: skip
    """Adds one pattern (KEYS), the sinks (SINKS) and zero keys (ZEROS) to (SOURCE, LSE); the sum goes to TARGET.

    FIRST: there is no sum so far, and SOURCE is not read. SOURCE and TARGET share strides, LSE is [B, H, Q].
    """
    pid = tl.program_id(0)
    b, head, start, length, origin, rows, row, row_stop = find_queries(
        pid, TABLE, batch, head_start, total_heads, queries, length, query_offset, entries, first_segment, segments,
        tiles, segment_length, rate, CONTIGUOUS, PACKED, BM
    )  # fmt: skip
    if row >= row_stop:
        return
    h = (pid // entries).to(tl.int64)
    g = h // (heads // groups)
    r = row + tl.arange(0, BM)
    p = origin + rate * r
    token = tl.cast(start + origin, tl.int64)
    here = token - query_offset
    q = load_rows(Q + b * q_batch + h * q_head + here * q_token, row, row_stop, rate * q_token, D, BM, BD, True, WIDE)
    sums = LSE + (b * heads + h) * queries + here + tl.cast(rate, tl.int64) * r
    place = b * o_batch + h * o_head + here * o_token
    if FIRST:
        m = tl.full([BM], float("-inf"), tl.float32)
        acc = tl.zeros([BM, BD], tl.float32)
    else:
        m = tl.load(sums, mask=r < row_stop, other=float("-inf")) * 1.4426950408889634
        acc = load_rows(SOURCE + place, row, row_stop, rate * o_token, D, BM, BD, True, WIDE).to(tl.float32)
        acc = tl.where((m == float("-inf"))[:, None], 0.0, acc)
    z = tl.where(m == float("-inf"), 0.0, 1.0)
    key_base = K + b * k_batch + g * k_head
    value_base = V + b * v_batch + g * v_head
    if KEYS:
        begin, a, free, stop, low, limit = key_ranges(
            p, row, row_stop, origin, rate, rows, sinks, window, dense, inner, CAUSAL, LOCAL, AFTER_WINDOW, INNER,
            len(EARLIER_W) > 0, BM, BN
        )  # fmt: skip
        k_rows = key_base + token * k_token
        v_rows = value_base + token * v_token
        for column in tl.range(a, free, BN):
            m, z, acc = attend_tile(
                q, m, z, acc, k_rows, v_rows, column, rows, rate * k_token, rate * v_token, scale, low, limit, p,
                origin, rate, head, total_heads, False, CONTIGUOUS, LOCAL, EARLIER_W, EARLIER_R, D, BD, BN, WIDE,
                INTERPRETED
            )  # fmt: skip
        before = (a - begin) // BN
        for i in tl.range(0, before + rows_below(stop - free, BN)):
            column = tl.where(i < before, begin + i * BN, free + (i - before) * BN)
            m, z, acc = attend_tile(
                q, m, z, acc, k_rows, v_rows, column, rows, rate * k_token, rate * v_token, scale, low, limit, p,
                origin, rate, head, total_heads, True, CONTIGUOUS, LOCAL, EARLIER_W, EARLIER_R, D, BD, BN, WIDE,
                INTERPRETED
            )  # fmt: skip
    if SINKS:
        count = tl.minimum(sinks, length)
        limit = p * 0 + count
        if CAUSAL:
            limit = tl.minimum(limit, p + 1)
        first_key = tl.cast(start, tl.int64)
        for column in tl.range(0, count, BN):
            m, z, acc = attend_tile(
                q, m, z, acc, key_base + first_key * k_token, value_base + first_key * v_token, column, count, k_token,
                v_token, scale, limit, limit, p, 0, 1, head, total_heads, True, CONTIGUOUS, False, (), (), D, BD, BN,
                WIDE, INTERPRETED
            )  # fmt: skip
    if ZEROS:
        zeros = rows_below(tl.minimum(segment_length, length), rate) - rows
        larger = tl.where(zeros > 0, tl.maximum(m, 0.0), m)
        shift = tl.where(larger == float("-inf"), 0.0, larger)
        shrink = tl.exp2(m - shift)
        z = z * shrink + zeros * tl.exp2(-shift)
        acc = acc * shrink[:, None]
        m = larger
    total = tl.where(z == 0.0, 1.0, z)
    store_rows(TARGET + place, row, row_stop, rate * o_token, acc / total[:, None], D, BM, BD, WIDE)
    lse = tl.where(z == 0.0, float("-inf"), (m + tl.log2(total)) * 0.6931471805599453)
    tl.store(sums, lse, mask=r < row_stop)


@jit
def row_sums_kernel(GRAD, OUT, SUMS, g_batch, g_head, g_token, o_batch, o_head, o_token, heads, queries, tiles,
                    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """rowsum(dO * O) of all queries, [B, H, Q]."""
    pid = tl.program_id(0)
    pair = (pid // tiles).to(tl.int64)
    b = pair // heads
    h = pair % heads
    row = pid % tiles * BM
    grad = load_rows(GRAD + b * g_batch + h * g_head, row, queries, g_token, D, BM, BD, True, WIDE)
    out = load_rows(OUT + b * o_batch + h * o_head, row, queries, o_token, D, BM, BD, True, WIDE)
    r = row + tl.arange(0, BM)
    tl.store(SUMS + pair * queries + r, tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1), mask=r < queries)


@jit
def query_grad_tile(q, grad, lse, sums, dq, K, V, column, rows, k_step, v_step, scale, low, limit, p, origin, rate,
                    head, total_heads, MASKED: tl.constexpr, CONTIGUOUS: tl.constexpr, LOCAL: tl.constexpr,
                    EARLIER_W: tl.constexpr, EARLIER_R: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
                    BN: tl.constexpr, WIDE: tl.constexpr, INTERPRETED: tl.constexpr):  # fmt: skip
    """dq with the share of one more tile of keys: dS @ K, where dS = P * (dO @ V' - rowsum(dO * O))."""
    k = load_rows(K, column, rows, k_step, D, BN, BD, MASKED, WIDE)
    v = load_rows(V, column, rows, v_step, D, BN, BD, MASKED, WIDE)
    e = tl.exp2(product(q, tl.trans(k), INTERPRETED) * scale - lse[:, None])
    if MASKED:
        seen = visible_keys(column, low, limit, p, origin, rate, head, total_heads, CONTIGUOUS, LOCAL, EARLIER_W,
                            EARLIER_R, BN)  # fmt: skip
        e = tl.where(seen, e, 0.0)
    ds = e * (product(grad, tl.trans(v), INTERPRETED) - sums[:, None])
    return dq + product(ds.to(k.dtype), k, INTERPRETED)


# Longer than other functions: one program, whose tiles would travel through each call.
@jit
def query_grad_kernel(Q, K, V, GRAD, LSE, SUMS, SOURCE, TARGET, TABLE, q_batch, q_head, q_token, k_batch, k_head,
                      k_token, v_batch, v_head, v_token, g_batch, g_head, g_token, o_batch, o_head, o_token, batch,
                      heads, groups, head_start, total_heads, queries, length, query_offset, entries, first_segment,
                      segments, tiles, segment_length, rate, sinks, window, dense, inner, scale, factor,
                      CAUSAL: tl.constexpr, CONTIGUOUS: tl.constexpr, LOCAL: tl.constexpr, AFTER_WINDOW: tl.constexpr,
                      INNER: tl.constexpr, EARLIER_W: tl.constexpr, EARLIER_R: tl.constexpr, PACKED: tl.constexpr,
                      FIRST: tl.constexpr, KEYS: tl.constexpr, SINKS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
                      BM: tl.constexpr, BN: tl.constexpr, WIDE: tl.constexpr, INTERPRETED: tl.constexpr):  # fmt: skip
    """Adds the gradient of the queries by one pattern and the sinks to SOURCE; the owners are those of the forward.

    `factor` is that of the logits, and `scale` the same in powers of two.
    """
    pid = tl.program_id(0)
    b, head, start, length, origin, rows, row, row_stop = find_queries(
        pid, TABLE, batch, head_start, total_heads, queries, length, query_offset, entries, first_segment, segments,
        tiles, segment_length, rate, CONTIGUOUS, PACKED, BM
    )  # fmt: skip
    if row >= row_stop:
        return
    h = (pid // entries).to(tl.int64)
    g = h // (heads // groups)
    r = row + tl.arange(0, BM)
    p = origin + rate * r
    token = tl.cast(start + origin, tl.int64)
    here = token - query_offset
    q = load_rows(Q + b * q_batch + h * q_head + here * q_token, row, row_stop, rate * q_token, D, BM, BD, True, WIDE)
    grad = load_rows(
        GRAD + b * g_batch + h * g_head + here * g_token, row, row_stop, rate * g_token, D, BM, BD, True, WIDE
    )
    line = (b * heads + h) * queries + here + tl.cast(rate, tl.int64) * r
    lse = load_lse(LSE + line, r < row_stop)
    sums = tl.load(SUMS + line, mask=r < row_stop, other=0.0)
    place = b * o_batch + h * o_head + here * o_token
    dq = tl.zeros([BM, BD], tl.float32)
    key_base = K + b * k_batch + g * k_head
    value_base = V + b * v_batch + g * v_head
    if KEYS:
        begin, a, free, stop, low, limit = key_ranges(
            p, row, row_stop, origin, rate, rows, sinks, window, dense, inner, CAUSAL, LOCAL, AFTER_WINDOW, INNER,
            len(EARLIER_W) > 0, BM, BN
        )  # fmt: skip
        k_rows = key_base + token * k_token
        v_rows = value_base + token * v_token
        for column in tl.range(a, free, BN):
            dq = query_grad_tile(
                q, grad, lse, sums, dq, k_rows, v_rows, column, rows, rate * k_token, rate * v_token, scale, low, limit,
                p, origin, rate, head, total_heads, False, CONTIGUOUS, LOCAL, EARLIER_W, EARLIER_R, D, BD, BN, WIDE,
                INTERPRETED
            )  # fmt: skip
        before = (a - begin) // BN
        for i in tl.range(0, before + rows_below(stop - free, BN)):
            column = tl.where(i < before, begin + i * BN, free + (i - before) * BN)
            dq = query_grad_tile(
                q, grad, lse, sums, dq, k_rows, v_rows, column, rows, rate * k_token, rate * v_token, scale, low, limit,
                p, origin, rate, head, total_heads, True, CONTIGUOUS, LOCAL, EARLIER_W, EARLIER_R, D, BD, BN, WIDE,
                INTERPRETED
            )  # fmt: skip
    if SINKS:
        count = tl.minimum(sinks, length)
        limit = p * 0 + count
        if CAUSAL:
            limit = tl.minimum(limit, p + 1)
        first_key = tl.cast(start, tl.int64)
        for column in tl.range(0, count, BN):
            dq = query_grad_tile(
                q, grad, lse, sums, dq, key_base + first_key * k_token, value_base + first_key * v_token, column, count,
                k_token, v_token, scale, limit, limit, p, 0, 1, head, total_heads, True, CONTIGUOUS, False, (), (), D,
                BD, BN, WIDE, INTERPRETED
            )  # fmt: skip
    dq = dq * factor
    if not FIRST:
        dq += load_rows(SOURCE + place, row, row_stop, rate * o_token, D, BM, BD, True, WIDE).to(tl.float32)
    store_rows(TARGET + place, row, row_stop, rate * o_token, dq, D, BM, BD, WIDE)
