"""Triton kernels of dilated attention that own keys: their gradients and those of the sinks (see triton_kernels.py).

A program owns some keys of one segment and one key/value head that query heads of one offset select, and goes through
the queries of those heads. Different offsets select different keys, so no two programs of a launch write the same row:
gradients are added to float32 in place, without atomics and in one order.
"""

from __future__ import annotations


try:
    import triton.language as tl
except ImportError:
    tl = None

from .triton_kernels import (
    find_lattice,
    find_tile,
    hide_earlier,
    jit,
    load_lse,
    load_rows,
    product,
    rows_below,
    store_rows,
)


@jit
def first_query(k, origin, rate, window, dense, inner, CAUSAL: tl.constexpr, AFTER_WINDOW: tl.constexpr,
                INNER: tl.constexpr):  # fmt: skip
    """The first lattice row that sees the key at k: `key_limit` from the other side."""
    if CAUSAL:
        p = k
        if INNER:
            p = tl.maximum(p, (k // inner + 1) * inner)
        if AFTER_WINDOW:
            p = tl.maximum(p, tl.maximum(k + window, dense))
        return rows_below(p - origin, rate)
    else:
        return k * 0


@jit
def group_heads(group_start, share, total_heads, rate, index, CONTIGUOUS: tl.constexpr):
    """The heads of a group that have its offset number `index`, as (offset, first, stop, step) within the group."""
    if CONTIGUOUS:
        per_offset = (total_heads + rate - 1) // rate
        s = group_start // per_offset + index
        first = tl.maximum(s * per_offset - group_start, 0)
        return s, first, tl.minimum((s + 1) * per_offset - group_start, share), 1
    else:
        return (group_start + index) % rate, index, share, rate


@jit
def key_grad_tile(k, v, dk, dv, Q, GRAD, LSE, SUMS, row, row_stop, q_step, g_step, s_step, scale, from_row, to_row,
                  kp, origin, rate, head, total_heads, MASKED: tl.constexpr, CONTIGUOUS: tl.constexpr,
                  EARLIER_W: tl.constexpr, EARLIER_R: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
                  BM: tl.constexpr, WIDE: tl.constexpr, INTERPRETED: tl.constexpr):  # fmt: skip
    """dk (to be multiplied by the factor of the logits) and dv with the share of one more tile of queries.

    All products are those of P', [BN, BM]: nothing that was computed has to be transposed.
    """
    q = load_rows(Q, row, row_stop, q_step, D, BM, BD, MASKED, WIDE)
    grad = load_rows(GRAD, row, row_stop, g_step, D, BM, BD, MASKED, WIDE)
    r = row + tl.arange(0, BM)
    place = tl.cast(row, tl.int64) * s_step + tl.arange(0, BM).to(tl.int64) * s_step
    if MASKED:
        lse = load_lse(LSE + place, r < row_stop)
        sums = tl.load(SUMS + place, mask=r < row_stop, other=0.0)
    else:
        lse = tl.load(LSE + place) * 1.4426950408889634
        sums = tl.load(SUMS + place)
    e = tl.exp2(product(k, tl.trans(q), INTERPRETED) * scale - lse[None, :])
    if MASKED:
        seen = (r[None, :] >= from_row[:, None]) & (r[None, :] < to_row[:, None])
        if len(EARLIER_W) > 0:
            p = origin + rate * r
            seen = hide_earlier(seen, p[None, :], kp[:, None], head, total_heads, CONTIGUOUS, EARLIER_W, EARLIER_R)
        e = tl.where(seen, e, 0.0)
    dv += product(e.to(grad.dtype), grad, INTERPRETED)
    ds = e * (product(v, tl.trans(grad), INTERPRETED) - sums[None, :])
    dk += product(ds.to(q.dtype), q, INTERPRETED)
    return dk, dv


# Longer than other functions: one program, whose tiles would travel through each call.
@jit
def key_grad_kernel(Q, K, V, GRAD, LSE, SUMS, DK, DV, TABLE, q_batch, q_head, q_token, k_batch, k_head, k_token,
                    v_batch, v_head, v_token, g_batch, g_head, g_token, d_batch, d_head, d_token, batch, heads, groups,
                    head_start, total_heads, queries, length, query_offset, entries, first_segment, segments, tiles,
                    segment_length, rate, offsets, sinks, window, dense, inner, scale, factor, CAUSAL: tl.constexpr,
                    CONTIGUOUS: tl.constexpr, LOCAL: tl.constexpr, AFTER_WINDOW: tl.constexpr, INNER: tl.constexpr,
                    EARLIER_W: tl.constexpr, EARLIER_R: tl.constexpr, PACKED: tl.constexpr, D: tl.constexpr,
                    BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, WIDE: tl.constexpr,
                    INTERPRETED: tl.constexpr):  # fmt: skip
    """Adds the gradients by one pattern to DK and DV (float32, with the same strides), sinks left out."""
    pid = tl.program_id(0)
    b, start, length, segment, tile = find_tile(
        pid % entries, TABLE, batch, length, first_segment, segments, tiles, PACKED, False
    )
    rest = pid // entries
    group = rest // offsets
    share = heads // groups
    s, first_head, stop_head, head_step = group_heads(
        head_start + group * share, share, total_heads, rate, rest % offsets, CONTIGUOUS
    )
    origin, rows, first_row, row_stop = find_lattice(
        segment, segment_length, s, start, length, query_offset, queries, rate
    )
    column = rows_below(sinks - origin, rate) + tile * BN
    if (first_head >= stop_head) | (column >= rows):
        return
    g = group.to(tl.int64)
    token = tl.cast(start + origin, tl.int64)
    here = token - query_offset
    kp = origin + rate * (column + tl.arange(0, BN))
    from_row = first_query(kp, origin, rate, window, dense, inner, CAUSAL, AFTER_WINDOW, INNER)
    to_row = from_row * 0 + row_stop
    first_key = origin + rate * column
    last_key = origin + rate * (tl.minimum(column + BN, rows) - 1)
    begin = first_query(first_key, origin, rate, window, dense, inner, CAUSAL, AFTER_WINDOW, INNER)
    begin = tl.maximum(begin, first_row)
    stop = row_stop
    free_stop = row_stop
    if LOCAL:  # seen by the queries of a window after it, or by the dense start
        to_row = tl.minimum(to_row, tl.maximum(kp + window, dense))
        free_stop = tl.minimum(stop, tl.maximum(first_key + window, dense))
        stop = tl.minimum(stop, tl.maximum(last_key + window, dense))
    a = begin
    free = begin
    if len(EARLIER_W) == 0:
        ragged = first_query(last_key, origin, rate, window, dense, inner, CAUSAL, AFTER_WINDOW, INNER)
        a = begin + rows_below(tl.minimum(ragged, stop) - begin, BM) * BM
        free = a + tl.maximum(free_stop - a, 0) // BM * BM
    before = (a - begin) // BM
    k = load_rows(
        K + b * k_batch + g * k_head + token * k_token, column, rows, rate * k_token, D, BN, BD, True, WIDE
    )
    v = load_rows(
        V + b * v_batch + g * v_head + token * v_token, column, rows, rate * v_token, D, BN, BD, True, WIDE
    )
    dk = tl.zeros([BN, BD], tl.float32)
    dv = tl.zeros([BN, BD], tl.float32)
    for j in tl.range(first_head, stop_head, head_step):
        h = g * share + j
        head = head_start + group * share + j
        q_rows = Q + b * q_batch + h * q_head + here * q_token
        g_rows = GRAD + b * g_batch + h * g_head + here * g_token
        lines = (b * heads + h) * queries + here
        for row in tl.range(a, free, BM):
            dk, dv = key_grad_tile(
                k, v, dk, dv, q_rows, g_rows, LSE + lines, SUMS + lines, row, row_stop, rate * q_token, rate * g_token,
                rate, scale, from_row, to_row, kp, origin, rate, head, total_heads, False, CONTIGUOUS, EARLIER_W,
                EARLIER_R, D, BD, BM, WIDE, INTERPRETED
            )  # fmt: skip
        for i in tl.range(0, before + rows_below(stop - free, BM)):
            row = tl.where(i < before, begin + i * BM, free + (i - before) * BM)
            dk, dv = key_grad_tile(
                k, v, dk, dv, q_rows, g_rows, LSE + lines, SUMS + lines, row, row_stop, rate * q_token, rate * g_token,
                rate, scale, from_row, to_row, kp, origin, rate, head, total_heads, True, CONTIGUOUS, EARLIER_W,
                EARLIER_R, D, BD, BM, WIDE, INTERPRETED
            )  # fmt: skip
    place = b * d_batch + g * d_head + token * d_token
    step = rate * d_token
    dk = dk * factor + load_rows(DK + place, column, rows, step, D, BN, BD, True, WIDE)
    dv += load_rows(DV + place, column, rows, step, D, BN, BD, True, WIDE)
    store_rows(DK + place, column, rows, step, dk, D, BN, BD, WIDE)
    store_rows(DV + place, column, rows, step, dv, D, BN, BD, WIDE)


@jit
def sink_grad_kernel(Q, K, V, GRAD, LSE, SUMS, PART_K, PART_V, TABLE, q_batch, q_head, q_token, k_batch, k_head,
                     k_token, v_batch, v_head, v_token, g_batch, g_head, g_token, batch, heads, groups, queries, length,
                     query_offset, entries, tiles, sinks, scale, chunks, CAUSAL: tl.constexpr, PACKED: tl.constexpr,
                     D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, WIDE: tl.constexpr,
                     INTERPRETED: tl.constexpr):  # fmt: skip
    """Gradients of the sinks by one of `chunks` stretches of queries: PART_K, PART_V [chunks, G, entries, BN, BD]."""
    pid = tl.program_id(0)
    b, start, length, _, tile = find_tile(pid % entries, TABLE, batch, length, 0, 1, tiles, PACKED, False)
    rest = pid // entries
    g = (rest % groups).to(tl.int64)
    share = heads // groups
    count = tl.minimum(sinks, length)
    column = tile * BN
    if column >= count:
        return
    first_row = tl.maximum(query_offset - start, 0)
    row_stop = tl.minimum(query_offset + queries - start, length)
    stretch = rows_below(rows_below(row_stop - first_row, BM), chunks) * BM
    begin = first_row + rest // groups * stretch
    stop = tl.minimum(begin + stretch, row_stop)
    token = tl.cast(start, tl.int64)
    here = token - query_offset
    k = load_rows(K + b * k_batch + g * k_head + token * k_token, column, count, k_token, D, BN, BD, True, WIDE)
    v = load_rows(V + b * v_batch + g * v_head + token * v_token, column, count, v_token, D, BN, BD, True, WIDE)
    kp = column + tl.arange(0, BN)
    from_row = kp * 0
    if CAUSAL:
        from_row = kp
    dk = tl.zeros([BN, BD], tl.float32)
    dv = tl.zeros([BN, BD], tl.float32)
    for j in tl.range(0, share):
        h = g * share + j
        q_rows = Q + b * q_batch + h * q_head + here * q_token
        g_rows = GRAD + b * g_batch + h * g_head + here * g_token
        lines = (b * heads + h) * queries + here
        for row in tl.range(begin, stop, BM):
            dk, dv = key_grad_tile(
                k, v, dk, dv, q_rows, g_rows, LSE + lines, SUMS + lines, row, stop, q_token, g_token, 1, scale,
                from_row, from_row * 0 + stop, kp, 0, 1, 0, 1, True, False, (), (), D, BD, BM, WIDE, INTERPRETED
            )  # fmt: skip
    part = pid.to(tl.int64) * (BN * BD)
    store_rows(PART_K + part, 0, BN, BD, dk, BD, BN, BD, False)
    store_rows(PART_V + part, 0, BN, BD, dv, BD, BN, BD, False)


@jit
def add_sinks_kernel(PART_K, PART_V, DK, DV, TABLE, d_batch, d_head, d_token, batch, groups, length, entries, tiles,
                     sinks, factor, chunks, PACKED: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
                     WIDE: tl.constexpr):  # fmt: skip
    """Adds the sums over the chunks to the rows of the sinks in DK and DV, in one order."""
    pid = tl.program_id(0)
    b, start, length, _, tile = find_tile(pid % entries, TABLE, batch, length, 0, 1, tiles, PACKED, False)
    g = (pid // entries).to(tl.int64)
    count = tl.minimum(sinks, length)
    column = tile * BN
    if column >= count:
        return
    dk = tl.zeros([BN, BD], tl.float32)
    dv = tl.zeros([BN, BD], tl.float32)
    for c in tl.range(0, chunks):
        part = (tl.cast(c, tl.int64) * groups * entries + pid) * (BN * BD)
        dk += load_rows(PART_K + part, 0, BN, BD, BD, BN, BD, False, False)
        dv += load_rows(PART_V + part, 0, BN, BD, BD, BN, BD, False, False)
    place = b * d_batch + g * d_head + tl.cast(start, tl.int64) * d_token
    dk = dk * factor + load_rows(DK + place, column, count, d_token, D, BN, BD, True, WIDE)
    dv += load_rows(DV + place, column, count, d_token, D, BN, BD, True, WIDE)
    store_rows(DK + place, column, count, d_token, dk, D, BN, BD, WIDE)
    store_rows(DV + place, column, count, d_token, dv, D, BN, BD, WIDE)
