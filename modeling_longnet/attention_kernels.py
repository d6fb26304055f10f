"""Attention kernels that give (out, log-sum-exp) and take them back for the backward: one interface over several.

All tensors are [B, H, N, D] with any strides over the first three dimensions, log-sum-exps [B, H, N] in float32
(float64 for float64). `causal` is only asked of squares. A backward is given the FINAL out and log-sum-exp of a softmax
over more keys than the block's own; dS = P * (dP - rowsum(dO * O)) with P = exp(S - lse) is then the block's share of
the gradient of the whole softmax.
"""

import contextlib
import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Protocol

import torch
from torch.autograd import forward_ad
from torch.nn.functional import pad

from .triton_attention import in_rows, why_not_triton


aten = torch.ops.aten
# Looked for once: a forward that is being compiled could not.
HAS_FLASH_ATTN = importlib.util.find_spec("flash_attn") is not None
HAS_TRITON = importlib.util.find_spec("triton") is not None


def _is_autocast(device_type: str) -> bool:
    # Asked for the meta device, PyTorch raises; whether it can be asked, PyTorch 2.11 cannot compile.
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def as_autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors in the dtype that autocast gives to products, where it is on; float64 stays as it is."""
    device_type = tensors[0].device.type
    if not _is_autocast(device_type) or tensors[0].dtype == torch.float64:
        return tensors
    return tuple(x.to(torch.get_autocast_dtype(device_type)) for x in tensors)


def own_precision(x: torch.Tensor) -> contextlib.AbstractContextManager:
    """While open, autocast leaves products in the dtype of their factors: for what `as_autocast` was asked before."""
    return torch.autocast(x.device.type, enabled=False) if _is_autocast(x.device.type) else contextlib.nullcontext()


class Kernel(Protocol):
    """What a backend provides; the two methods mirror each other."""

    def forward(self, query, key, value, causal: bool, scale: float) -> tuple[torch.Tensor, torch.Tensor]: ...

    def backward(self, grad, query, key, value, out, lse, causal: bool, scale: float) -> tuple[torch.Tensor, ...]: ...


def _side_by_side(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Rows that many queries will read, gathered: measured 10 % faster than in place, at strides of some KB."""
    many = min(x.shape[2] for x in tensors[:2]) >= 128
    return tuple(x.contiguous() if many else in_rows(x) for x in tensors)


def _band_mask(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """What a band adds to the scores of [M, n] queries and n + W - 1 keys, [M * n, n + W - 1]: query i of each member
    sees keys i to i + W - 1."""
    (members, rows), count = query.shape[2:4], key.shape[2]
    sees = torch.ones(rows, count, dtype=torch.bool, device=query.device).triu_().tril_(count - rows)
    return query.new_zeros(sees.shape).masked_fill_(~sees, -torch.inf).repeat(members, 1)


class CpuFlash:
    """PyTorch's fused CPU kernel; it takes any strides of whole rows, and masks."""

    @staticmethod
    def forward(query, key, value, causal, scale):
        query, key, value = _side_by_side(query, key, value)
        return aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, causal, scale=scale)

    @staticmethod
    def forward_band(query, key, value, scale):
        """Of M query heads together, which share keys: query [B, G, M, n, D], key and value [B, G, n + W - 1, D]."""
        rows = (in_rows(x) for x in (query.flatten(2, 3), key, value))
        mask = _band_mask(query, key)
        result = aten._scaled_dot_product_flash_attention_for_cpu(*rows, 0.0, False, attn_mask=mask, scale=scale)
        return tuple(x.unflatten(2, query.shape[2:4]) for x in result)

    @staticmethod
    def backward(grad, query, key, value, out, lse, causal, scale):
        query, key, value, grad, out = _side_by_side(query, key, value, grad, out)
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, query, key, value, out, lse, 0.0, causal, scale=scale
        )

    @staticmethod
    def backward_band(grad, query, key, value, out, lse, scale):
        mask, together = _band_mask(query, key), [x.flatten(2, 3) for x in (grad, query, out, lse)]
        rows = (in_rows(x) for x in (*together[:2], key, value, together[2]))
        grad_query, *grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *rows, together[3], 0.0, False, attn_mask=mask, scale=scale
        )
        return grad_query.unflatten(2, query.shape[2:4]), *grads


def _in_whole_widths(run: Callable) -> Callable:
    """Runs a kernel on rows in one piece, of multiples of 8, as those on CUDA want them; zeros change nothing."""

    @functools.wraps(run)
    def padded(*args):
        width = args[0].shape[-1]
        fit = in_rows if width % 8 == 0 else lambda x: pad(x, (0, -width % 8))
        args = (fit(x) if isinstance(x, torch.Tensor) and x.dim() == 4 else x for x in args)
        return tuple(x[..., :width] if x.dim() == 4 else x for x in run(*args))

    return padded


class CudaFlash:
    """PyTorch's FlashAttention-2 for float16 and bfloat16 on CUDA."""

    @staticmethod
    @_in_whole_widths
    def forward(query, key, value, causal, scale):
        return aten._scaled_dot_product_flash_attention(query, key, value, 0.0, causal, False, scale=scale)[:2]

    @staticmethod
    @_in_whole_widths
    def backward(grad, query, key, value, out, lse, causal, scale):
        # Without dropout the random state is never read, but the operator wants tensors for it.
        state = torch.zeros(2, dtype=torch.uint64, device=query.device)
        return aten._scaled_dot_product_flash_attention_backward(
            grad, query, key, value, out, lse.contiguous(), None, None, query.shape[2], key.shape[2], 0.0, causal,
            state, state, scale=scale,
        )  # fmt: skip


class CudaEfficient:
    """PyTorch's memory-efficient kernel on CUDA, for float32; its log-sum-exp is padded to a multiple of 32 queries."""

    @staticmethod
    @_in_whole_widths
    def forward(query, key, value, causal, scale):
        out, lse, *_ = aten._scaled_dot_product_efficient_attention(
            query, key, value, None, True, 0.0, causal, scale=scale
        )
        return out, lse[..., : query.shape[2]]

    @staticmethod
    @_in_whole_widths
    def backward(grad, query, key, value, out, lse, causal, scale):
        lse = pad(lse, (0, -lse.shape[-1] % 32), value=torch.inf).contiguous()
        state = torch.zeros((), dtype=torch.long, device=query.device)
        *grads, _ = aten._scaled_dot_product_efficient_attention_backward(
            grad, query, key, value, None, out, lse, state, state, 0.0, [True, True, True, False], causal, scale=scale
        )
        return tuple(grads)


def _flash_attn():
    """Not by an import statement: what those name, Transformers demands of all who load the code from the Hub."""
    return importlib.import_module("flash_attn.flash_attn_interface")


class FlashAttention2:
    """The flash-attn package (2.7 and later); it wants [B, N, H, D]."""

    @staticmethod
    @_in_whole_widths
    def forward(query, key, value, causal, scale):
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        settings = (0.0, scale, causal, -1, -1, 0.0, None, False)
        out, lse, *_ = _flash_attn()._flash_attn_forward(query, key, value, *settings)
        return out.transpose(1, 2), lse

    @staticmethod
    @_in_whole_widths
    def backward(grad, query, key, value, out, lse, causal, scale):
        grad, query, key, value, out = (x.transpose(1, 2).contiguous() for x in (grad, query, key, value, out))
        grads = tuple(torch.empty_like(x) for x in (query, key, value))
        _flash_attn()._flash_attn_backward(
            grad, query, key, value, out, lse.contiguous(), *grads, 0.0, scale, causal, -1, -1, 0.0, None, False
        )
        return tuple(g.transpose(1, 2) for g in grads)


BACKENDS = ("eager", "sdpa", "flash_attention_2", "triton")
_HALF = (torch.float16, torch.bfloat16)


def why_not(backend: str, query: torch.Tensor, dropout: float) -> str | None:
    """The reason why `backend` cannot run on tensors like `query`, or None when it can."""
    if backend == "eager":
        return None
    if dropout:
        return f"its kernels have no dropout that the exact backward could replay, got dropout={dropout}"
    if not query.dtype.is_floating_point:
        return f"it wants floating point tensors, got {query.dtype}"
    device, width = query.device.type, query.shape[-1]
    if backend == "sdpa":
        if device not in ("cpu", "cuda"):
            return f"PyTorch has no kernel with a log-sum-exp for it on {device!r}"
        if device == "cuda" and query.dtype == torch.float64:
            return "PyTorch has no fused kernel for float64 on CUDA"
        if device == "cuda" and query.dtype in _HALF and width > 256:
            return f"PyTorch's flash kernel takes head dimensions up to 256, got {width}"
        return None
    if backend == "triton":
        return why_not_triton(query) if HAS_TRITON else "Triton is not installed (pip install triton; Linux)"
    if not HAS_FLASH_ATTN:
        return "the flash-attn package is not installed (pip install flash-attn)"
    if device != "cuda" or query.dtype not in _HALF:
        return f"flash-attn runs float16 and bfloat16 on CUDA, got {query.dtype} on {device!r}"
    return f"flash-attn takes head dimensions up to 256, got {width}" if width > 256 else None


def check_backend(backend: object) -> None:
    """Raises a ValueError for what is neither None nor the name of a backend."""
    if backend is not None and (not isinstance(backend, str) or backend not in BACKENDS):
        raise ValueError(f"`backend` must be None or one of {', '.join(map(repr, BACKENDS))}, got {backend!r}.")


def choose_backend(backend: str | None, query: torch.Tensor, dropout: float) -> str:
    """The backend to run: the one asked for by name, or with None the first that can.

    Raises:
        ValueError: the name is unknown, or the backend that was asked for cannot run these inputs.
    """
    if backend is None:
        return next(name for name in ("flash_attention_2", "sdpa", "eager") if not why_not(name, query, dropout))
    check_backend(backend)
    reason = why_not(backend, query, dropout)
    if reason:
        raise ValueError(f"`backend={backend!r}` cannot run these inputs: {reason}.")
    return backend


def refuse_tangents(backend: str, *tensors: torch.Tensor) -> None:
    """Raises a ValueError in forward-mode differentiation, whose tangents the fused kernels would drop for zeros."""
    if any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise ValueError(
            f"`backend={backend!r}` has no forward-mode derivative (torch.func.jvp, jacfwd, forward_ad): use "
            "`backend='eager'`, or `attn_implementation='eager'` of a LongNet, without a bounded cache."
        )


def get_kernel(backend: str, query: torch.Tensor) -> type[Kernel]:
    """The kernel behind a backend that `choose_backend` returned ("eager" has none).

    Raises:
        ValueError: for "triton", which knows whole patterns and no blocks.
    """
    if backend == "triton":
        raise ValueError(
            "`backend='triton'` wants all keys at hand: it runs no memory, no chunk behind a bounded cache, no "
            "sequence parallelism. Use another backend, or None, with those."
        )
    if backend == "flash_attention_2":
        return FlashAttention2
    if query.device.type == "cpu":
        return CpuFlash
    return CudaFlash if query.dtype in _HALF else CudaEfficient
