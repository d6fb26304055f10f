"""Dilated attention: the public operator, its exact and lean forward and backward.

Letters: B batch, H query heads, G key/value heads (H % G == 0), N tokens of the keys, Q tokens of the queries, D head
dimension, w segment length, r dilation rate.
"""

import math
import numbers
import re
from collections.abc import Callable
from functools import partial

import torch

from .attention_blocks import PlannedAttention, attend_blocks_eager, connected_zeros, plan_of, with_lse_gradient
from .attention_kernels import (
    HAS_TRITON,
    Kernel,
    as_autocast,
    choose_backend,
    get_kernel,
    refuse_tangents,
)
from .attention_token import Piece, attend_piece, attend_token, only_piece, plan_token
from .dilation_plan import plan_blocks
from .dilation_schedule import LARGEST, DilationSchedule, Heads, as_integer
from .document_ids import document_positions
from .memory_attention import attend_documents
from .memory_search import MemoryBasis
from .memory_spec import MemorySpec
from .triton_attention import TritonCall, is_faster, triton_backward, triton_forward


# The argument of models by which attention functions get an object whose `attend` they hand on as `elsewhere`.
ELSEWHERE = "sequence_parallel"


def find_runs(document_ids: torch.Tensor | None, batch: int, length: int) -> list[tuple[slice, int, int]]:
    """(rows of the batch, start, stop) of each run of equal, non-negative ids; one of them when there are no ids."""
    if document_ids is None:
        return [(slice(0, batch), 0, length)]
    position, _ = document_positions(document_ids)
    starts = (position == 0).nonzero().tolist()
    padding = (document_ids < 0).tolist()
    runs = [[] for _ in range(batch)]
    for (row, start), after in zip(starts, starts[1:] + [[-1, 0]]):
        stop = after[1] if after[0] == row else length
        if not padding[row][start]:
            runs[row].append((start, stop))
    if all(r == runs[0] for r in runs):
        return [(slice(0, batch), *run) for run in runs[0]]
    return [(slice(row, row + 1), *run) for row in range(batch) for run in runs[row]]


def _pieces(query, key, document_ids, query_offset, schedule, heads, plan=plan_blocks):
    """Per document: rows of the batch, its queries as a slice of Q, its keys as a slice of N, its plan of blocks."""
    query_length, (batch, _, length, _) = query.shape[2], key.shape
    for rows, start, stop in find_runs(document_ids, batch, length):
        first, last = max(start, query_offset), min(stop, query_offset + query_length)
        if first >= last:
            continue
        reach = last if schedule.is_causal else stop
        planned = plan(schedule, heads, first - start, last - start, reach - start)
        yield rows, slice(first - query_offset, last - query_offset), slice(start, reach), first - start, planned


def _empty_out(query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Out [B, H, Q, D] with the heads next to each other, as the output projection reads it, and lse [B, H, Q]."""
    batch, num_heads, length, width = query.shape
    lse_dtype = torch.promote_types(query.dtype, torch.float32)
    out = query.new_empty(batch, length, num_heads, width).transpose(1, 2)
    return out, query.new_empty(batch, num_heads, length, dtype=lse_dtype)


def _run(kernel, pieces, query, key, value, scale) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) of `_pieces`, whose plan is one of blocks or, for a single query, the parts of a token's attention."""
    out, lse = _empty_out(query)
    # Half precisions are mixed in float32: rounding between patterns would cost what the kernels took care to keep.
    mixed = out if query.dtype == lse.dtype else torch.empty_like(out, dtype=lse.dtype)
    mixed.zero_()
    lse.fill_(-torch.inf)
    whole = slice(0, len(query)), slice(0, query.shape[2]), slice(0, key.shape[2])
    for *place, start, plan in pieces:
        tensors = query, key, value, mixed, lse
        if tuple(place) != whole:  # slicing takes its time
            rows, q, k = place
            tensors = query[rows, :, q], key[rows, :, k], value[rows, :, k], mixed[rows, :, q], lse[rows, :, q]
        if plan and isinstance(plan[0], Piece):
            attend_token(kernel, plan, *tensors, scale)
        else:
            PlannedAttention(kernel, plan, start, scale).forward(*tensors)
    if mixed is not out:
        out.copy_(mixed)
    return out, lse


def _forward(query, key, value, document_ids, offset_tensor, query_offset, heads, schedule, scale, backend):
    schedule = DilationSchedule.from_text(schedule)
    if offset_tensor is not None:
        query_offset = int(offset_tensor)
    heads = Heads.of(query, key, *heads)
    if backend == "triton":
        out, lse = _empty_out(query)
        triton_forward(TritonCall(query, key, value, document_ids, query_offset, schedule, heads, scale), out, lse)
        return out, lse
    kernel = get_kernel(backend, query)
    plan = plan_token if query.shape[2] == 1 and schedule.padding == "mask" else partial(plan_of, kernel)
    pieces = _pieces(query, key, document_ids, query_offset, schedule, heads, plan)
    return _run(kernel, pieces, query, key, value, scale)


def prepare_token(
    query, key, value, schedule: DilationSchedule, *, scale, heads: Heads, document_ids, query_offset, backend
) -> Callable[..., torch.Tensor] | None:
    """[`scheduled_attention`] of one query a row, without gradients or autocast, as a function of query, key and value
    like these: for all layers of a decoding step. None for what has to go the long way."""
    _check_types(query, key, value, document_ids, query_offset, scale, 0.0)
    query_offset = key.shape[2] - 1 if query_offset is None else int(query_offset)
    _check_tensors(query, key, value, document_ids, query_offset, 0.0)
    backend = choose_backend(backend, query, 0.0)
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    if backend in ("eager", "triton") or schedule.memory is not None or schedule.padding != "mask" or scale <= 0:
        return None
    pieces = [*_pieces(query, key, document_ids, query_offset, schedule, heads, plan_token)]
    kernel = get_kernel(backend, query)
    alone = only_piece([plan for *_, plan in pieces], query) if document_ids is None else None

    def attend(query, key, value):
        refuse_tangents(backend, query, key, value)
        if alone is None:
            return _run(kernel, pieces, query, key, value, scale)[0]
        return attend_piece(kernel, alone, query, key, value, scale)[0].reshape(query.shape)

    return attend


def _backward(
    grad, query, key, value, out, lse, document_ids, offset_tensor, query_offset, heads, schedule, scale, backend
):
    schedule = DilationSchedule.from_text(schedule)
    if offset_tensor is not None:
        query_offset = int(offset_tensor)
    heads = Heads.of(query, key, *heads)
    if backend == "triton":
        call = TritonCall(query, key, value, document_ids, query_offset, schedule, heads, scale)
        return triton_backward(call, grad, out, lse)
    grads = [torch.zeros_like(x, dtype=lse.dtype) for x in (query, key, value)]
    kernel = get_kernel(backend, query)
    pieces = _pieces(query, key, document_ids, query_offset, schedule, heads, partial(plan_of, kernel, backward=True))
    for rows, q, k, start, blocks in pieces:
        own_grad, own_query, own_out, own_lse, query_grad = (x[rows, :, q] for x in (grad, query, out, lse, grads[0]))
        own_key, own_value, *key_grads = (x[rows, :, k] for x in (key, value, *grads[1:]))
        PlannedAttention(kernel, blocks, start, scale).backward(
            own_grad, own_query, own_key, own_value, own_out, own_lse, (query_grad, *key_grads)
        )
    return tuple(g.to(query.dtype) for g in grads)


# Opaque to torch.compile, which would otherwise unroll every block. The name holds the module's own: code loaded from
# the Hub lives in a second module beside an installed package, and each registers its operators once. It holds
# "flash_attn" too: by that TRL's selective checkpointing knows what it had better keep than compute again.
NAMESPACE = "longnet_flash_attn_" + re.sub(r"\W", "_", __name__)
_SETTINGS = (
    "Tensor? document_ids, Tensor? offset_tensor, SymInt query_offset, int[] heads, str schedule, float scale, "
    "str backend"
)
_forward_op = torch.library.custom_op(
    f"{NAMESPACE}::forward",
    _forward,
    mutates_args=(),
    schema=f"(Tensor query, Tensor key, Tensor value, {_SETTINGS}) -> (Tensor, Tensor)",
)
_backward_op = torch.library.custom_op(
    f"{NAMESPACE}::backward",
    _backward,
    mutates_args=(),
    schema="(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, "
    f"{_SETTINGS}) -> (Tensor, Tensor, Tensor)",
)


@_forward_op.register_fake
def _(query, key, value, *settings):
    return _empty_out(query)


@_backward_op.register_fake
def _(grad, query, key, value, *rest):
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _save_for_backward(ctx, inputs, output):
    query, key, value, document_ids, offset_tensor, *ctx.settings = inputs
    ctx.save_for_backward(query, key, value, *output, document_ids, offset_tensor)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad, grad_lse):
    query, key, value, out, lse, document_ids, offset_tensor = ctx.saved_tensors
    width = query.shape[-1]
    grad, query, key, value, out = with_lse_gradient(grad, grad_lse, query, key, value, out)
    grads = _backward_op(grad, query, key, value, out, lse, document_ids, offset_tensor, *ctx.settings)
    return *(g[..., :width] for g in grads), None, None, *(None for _ in ctx.settings)


_forward_op.register_autograd(_differentiate, setup_context=_save_for_backward)


def _eager(query, key, value, document_ids, query_offset, schedule, heads, scale, dropout):
    """The same blocks in plain differentiable operations."""
    out = connected_zeros(query)
    lse = query.new_full(query.shape[:3], -torch.inf, dtype=torch.promote_types(query.dtype, torch.float32))
    for rows, q, k, start, blocks in _pieces(query, key, document_ids, query_offset, schedule, heads):
        plan = PlannedAttention(None, blocks, start, scale)
        piece = attend_blocks_eager(plan, query[rows, :, q], key[rows, :, k], value[rows, :, k], dropout)
        if len(query) == rows.stop - rows.start and query.shape[2] == q.stop - q.start:
            return piece
        out[rows, :, q], lse[rows, :, q] = piece
    return out, lse


def _as_integers(*values: object) -> list[object]:
    """NumPy's integers as Python's; all else, what is no integer included, as it is."""
    kept = (int, torch.SymInt, torch.Tensor, type(None))  # PyTorch 2.11 cannot compile what asks others
    return [x if isinstance(x, kept) or as_integer(x) is None else as_integer(x) for x in values]


def _check_integer(name: str, value: object, may_miss: bool) -> None:
    if not isinstance(value, (int, torch.SymInt)) and not (value is None and may_miss):
        raise ValueError(f"`{name}` must be an integer, got {value!r}.")


def _check_types(query, key, value, document_ids, query_offset, scale, dropout):
    for name, x, may_miss in (("query", query, False), ("key", key, False), ("value", value, False),
                              ("document_ids", document_ids, True)):  # fmt: skip
        if not isinstance(x, torch.Tensor) and not (x is None and may_miss):
            raise ValueError(f"`{name}` must be a tensor, got {x!r}.")
    is_element = isinstance(query_offset, torch.Tensor) and query_offset.numel() == 1
    if not (is_element and not query_offset.is_floating_point()):
        _check_integer("query_offset", query_offset, may_miss=True)
    for name, x in (("scale", scale), ("dropout", dropout)):
        if not isinstance(x, (numbers.Real, torch.SymFloat)) and (x is not None or name == "dropout"):
            raise ValueError(f"`{name}` must be a number, got {x!r}.")
        if isinstance(x, float) and not torch.compiler.is_compiling() and not math.isfinite(x):
            raise ValueError(f"`{name}` must be a finite number, got {x!r}.")


def _check_tensors(query, key, value, document_ids, query_offset, dropout):
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dim() != 4:
            raise ValueError(f"`{name}` must have 4 dimensions, [batch, heads, tokens, head_dim], got {shapes}.")
    if key.shape != value.shape:
        raise ValueError(f"`key` and `value` must have the same shape, got {shapes}.")
    if query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3]:
        raise ValueError(f"`query` and `key` must agree in batch and head dimension, got {shapes}.")
    if key.shape[1] == 0 or query.shape[1] % key.shape[1]:
        raise ValueError(f"`query` must have a multiple of the heads of `key`, got {shapes}.")
    if len({query.dtype, key.dtype, value.dtype}) > 1 or not query.dtype.is_floating_point:
        dtypes = f"{query.dtype}, {key.dtype}, {value.dtype}"
        raise ValueError(f"`query`, `key` and `value` must share one floating point dtype, got {dtypes}.")
    if len({query.device, key.device, value.device}) > 1:
        devices = f"{query.device}, {key.device}, {value.device}"
        raise ValueError(f"`query`, `key` and `value` must be on one device, got {devices}.")
    if document_ids is not None:
        if document_ids.shape != (key.shape[0], key.shape[2]) or document_ids.is_floating_point():
            raise ValueError(
                f"`document_ids` must be integers of shape {(key.shape[0], key.shape[2])}, one for each key, got "
                f"{document_ids.dtype} of shape {tuple(document_ids.shape)}."
            )
    if isinstance(query_offset, int) and not 0 <= query_offset <= key.shape[2] - query.shape[2]:
        raise ValueError(
            "`query_offset` must place all queries among the keys, i.e. lie between 0 and "
            f"{key.shape[2] - query.shape[2]}, got {query_offset} for {query.shape[2]} queries and {key.shape[2]} keys."
        )
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"`dropout` must be at least 0 and below 1, got {dropout}.")


def _place_heads(query, key, first: int, total: int | None) -> Heads | None:
    """The heads of a call with `head_index_offset` and `total_num_heads`; None for tensors that have none, which
    `scheduled_attention` refuses."""
    first, total = _as_integers(first, total)
    _check_integer("head_index_offset", first, may_miss=False)
    _check_integer("total_num_heads", total, may_miss=True)
    if not all(isinstance(x, torch.Tensor) and x.dim() == 4 for x in (query, key)):
        return None
    end = first + query.shape[1]
    if first < 0 or max(end, total or 0) > LARGEST or total is not None and end > total:
        raise ValueError(
            f"`head_index_offset` must place {query.shape[1]} heads among `total_num_heads`, got {first} and {total}."
        )
    return Heads.of(query, key, first, total)


def scheduled_attention(
    query, key, value, schedule: DilationSchedule, *, scale=None, inv_freq=None, basis=None, dropout=0.0,
    heads: Heads | None = None, document_ids=None, query_offset=None, backend=None, return_lse=False, elsewhere=None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """[`dilated_attention`] by a schedule that was made and checked before: what models call."""
    (query_offset,) = _as_integers(query_offset)
    _check_types(query, key, value, document_ids, query_offset, scale, dropout)
    query, key, value = as_autocast(query, key, value)
    if query_offset is None:
        query_offset = key.shape[-2] - query.shape[-2]  # of tensors that may turn out to have another rank
    _check_tensors(query, key, value, document_ids, query_offset, dropout)
    heads = Heads.of(query, key) if heads is None else heads
    is_free = backend is None and schedule.memory is None and elsewhere is None and isinstance(query_offset, int)
    is_free &= not torch.compiler.is_compiling()  # what a GPU is cannot be asked within a graph
    backend = choose_backend(backend, query, dropout)
    if is_free and backend == "sdpa" and HAS_TRITON and is_faster(query, key, schedule, heads):
        backend = "triton"
    if backend != "eager":
        refuse_tangents(backend, query, key, value)
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    if scale <= 0:  # the kernels hide by -inf before they scale
        query, scale = (-query, -scale) if scale else (query * 0, 1.0)
    if schedule.memory is not None:
        if elsewhere is not None:
            raise ValueError("`memory` does not read keys that lie on other ranks: no sequence parallelism yet.")
        out, lse = attend_documents(
            query, key, value, schedule, find_runs(document_ids, *key.shape[:3:2]), int(query_offset), scale=scale,
            backend=backend, heads=heads, inv_freq=inv_freq, basis=basis, dropout=dropout,
        )  # fmt: skip
        return (out, lse) if return_lse else out
    if elsewhere is not None:
        settings = {"scale": scale, "dropout": dropout, "backend": backend, "return_lse": return_lse}
        return elsewhere(query, key, value, schedule, heads, **settings)
    if backend == "eager":
        out, lse = _eager(query, key, value, document_ids, int(query_offset), schedule, heads, scale, dropout)
    else:
        offset_tensor = query_offset if isinstance(query_offset, torch.Tensor) else None
        # A decoding step outside a graph: the way through the dispatcher would take longer than what it leads to.
        is_plain = query.shape[2] == 1 and type(query) is torch.Tensor and not torch.compiler.is_compiling()
        wants_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
        run = _forward if is_plain and not wants_grad else _forward_op
        out, lse = run(
            query, key, value, document_ids, offset_tensor, 0 if offset_tensor is not None else query_offset,
            [heads.first, heads.total or heads.num_heads], schedule.to_text(), scale, backend,
        )  # fmt: skip
    return (out, lse) if return_lse else out


# Longer than other functions: by its arguments and what they mean.
def dilated_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segment_lengths: list[int],
    dilation_rates: list[int],
    *,
    is_causal: bool = True,
    scale: float | None = None,
    head_offsets: str = "modulo",
    overlap: str = "count",
    num_sink_tokens: int = 0,
    padding: str = "mask",
    local: str = "segment",
    memory: MemorySpec | dict | None = None,
    inv_freq: torch.Tensor | None = None,
    basis: MemoryBasis | None = None,
    dropout: float = 0.0,
    head_index_offset: int = 0,
    total_num_heads: int | None = None,
    document_ids: torch.Tensor | None = None,
    query_offset: int | torch.Tensor | None = None,
    backend: str | None = None,
    return_lse: bool = False,
    elsewhere: Callable[..., torch.Tensor] | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    r"""Dilated attention of LongNet, exact, at a cost of sum over i of w_i / r_i keys per query.

    Which keys a query sees is told and drawn in [`DilationSchedule`]; `dilated_attention_reference` is the definition.
    Only query, key, value, out and lse are kept for the backward, which is the exact gradient of the joint softmax.

    Args:
        query: [B, H, Q, D], float32, float64, bfloat16 or float16.
        key, value: [B, G, N, D] with H a multiple of G and Q <= N; query head j reads key/value head j // (H // G).
        segment_lengths, dilation_rates, is_causal, head_offsets, overlap, num_sink_tokens, padding, local, memory:
            see [`DilationSchedule`].
        inv_freq: [R / 2], the rotary frequencies by which the first R <= D channels of query and key were turned, for a
            `memory` with `max_distance`.
        basis: the few dimensions that a `memory` with `dimensions` ranks in.
        scale: factor of the logits, D ** -0.5 by default.
        dropout: probability with which attention weights are dropped (backend "eager" only).
        head_index_offset: index of the first head among all heads of the layer, when this call holds a slice of them
            (tensor parallelism, DeepSpeed Ulysses): the heads' offsets follow the global index.
        total_num_heads: all heads of the layer; `head_offsets="contiguous"` depends on it.
        document_ids: integers [B, N]. A run of equal ids in a row is a document: it sees only itself, and positions
            and segments count from its first token. Negative ids are padding, whose queries give zeros.
        query_offset: index of the first query among the keys, an integer or an integer tensor of one element;
            N - Q by default.
        backend: "eager" (plain PyTorch: dropout, second derivatives), "sdpa" (PyTorch's fused kernels),
            "flash_attention_2" (the flash-attn package), "triton" (one launch per pattern, CUDA), or None for the best
            that can run the inputs: "triton" where a GPU of that kind was measured (docs/gpu.md).
        return_lse: also return the log-sum-exp of the logits.
        elsewhere: what computes the operator where only some of the keys are at hand (see sequence_parallel.py).

    Returns:
        out [B, H, Q, D] in the dtype of `query`; with `return_lse` also lse [B, H, Q] (float32; float64 for float64).
        A query that no pattern selects gives zeros and a log-sum-exp of -inf.

    Raises:
        ValueError: for arguments that do not fit together, or a backend that cannot run them.

    Source: LongNet (arXiv 2307.02486), equations 5 to 15.
    """
    schedule = DilationSchedule(
        tuple(segment_lengths) if isinstance(segment_lengths, list) else segment_lengths,
        tuple(dilation_rates) if isinstance(dilation_rates, list) else dilation_rates,
        is_causal, head_offsets, overlap, num_sink_tokens, padding, local, memory,
    )  # fmt: skip
    return scheduled_attention(
        query, key, value, schedule, scale=scale, inv_freq=inv_freq, basis=basis, dropout=dropout,
        heads=_place_heads(query, key, head_index_offset, total_num_heads), document_ids=document_ids,
        query_offset=query_offset, backend=backend, return_lse=return_lse, elsewhere=elsewhere,
    )  # fmt: skip


__all__ = ["dilated_attention"]
