"""The ops on CPU in vectorised torch, and in C++ where the library was built.

Every row's bits depend on that row alone, for one machine, build and thread count. What breaks
that in torch, as measured (AVX2, torch 2.13): GEMMs of few rows choose other kernels (so rows come
padded to 16), `exp` and `silu` treat the tail of a flat buffer and the borders between threads by
other code (so `flat` feeds them whole vectors below the size at which torch splits work), and a
product with 8 rank rows differs from the same rows inside 64 (so LoRA goes page by page).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from ctypes import byref

import torch
import torch.nn.functional as F
from torch import Tensor

from . import calls, indices, native, reference

logger = logging.getLogger(__name__)

ROWS = 16
_WHOLE = 64  # elements: torch's elementwise loops take two vectors at a time, of 16 in AVX-512
_SERIAL = 32_768  # elements below which torch's elementwise ops use one thread


def padded(count: int) -> int:
    return -(-count // ROWS) * ROWS


def flat(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """An elementwise function, each element by the same vector code wherever it stands in `x`."""
    flat = x.reshape(-1)
    tail = -flat.numel() % _WHOLE
    if tail:
        flat = F.pad(flat, (0, tail))
    parts = [function(part) for part in torch.split(flat, _SERIAL)]
    joined = parts[0] if len(parts) == 1 else torch.cat(parts)
    return joined[: x.numel()].view(x.shape)


def silu_mul(x: Tensor) -> Tensor:
    """See `reference.silu_mul`."""
    code = native.DTYPE_CODES.get(x.dtype)
    if native.LIB is not None and code is not None and x.dim() == 2 and x.stride(1) == 1:
        tokens, inter = x.shape[0], x.shape[1] // 2
        out = calls.empty((tokens, inter), x.dtype)
        args = native.SiluArgs(
            out.data_ptr(), x.data_ptr(), x.stride(0), tokens, inter, code, torch.get_num_threads()
        )
        calls.call("silu_mul", args, out, x)
        return out
    gate, up = x.chunk(2, -1)
    return flat(F.silu, gate.float()).to(x.dtype).mul_(up)


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> Tensor:
    """See `reference.rms_norm`. Square roots and quotients are exact in any code path."""
    code, like = native.DTYPE_CODES.get(x.dtype), x if residual is None else residual
    if (
        native.LIB is not None
        and code is not None
        and x.dtype == weight.dtype == like.dtype
        and x.dim() == 2
        and x.shape == like.shape
        and x.stride(1) == like.stride(1) == weight.stride(0) == 1
    ):
        out = calls.empty(x.shape, x.dtype)
        args = native.NormArgs(
            out.data_ptr(), x.data_ptr(), None if residual is None else residual.data_ptr(),
            weight.data_ptr(), x.stride(0), like.stride(0), *x.shape, eps, code,
            torch.get_num_threads(),
        )  # fmt: skip
        calls.call("rms_norm", args, out, x, residual, weight)
        return out
    if residual is not None:
        residual.add_(x)
        x = residual
    h = x.float()
    variance = h.square().mean(-1, keepdim=True)
    return weight * (h / (variance + eps).sqrt()).to(x.dtype)


def rope_store_kv_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    kv_slots: Tensor,
    k_blocks: Tensor,
    v_blocks: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """See `reference.rope_store_kv_`: sums and products only, exact in any code path."""
    tokens, heads, dim = q.shape
    code = native.DTYPE_CODES.get(q.dtype)
    if (
        native.LIB is not None
        and code is not None
        and q.dtype == k.dtype == v.dtype == k_blocks.dtype == v_blocks.dtype
        and k.stride() == v.stride()
        and q.stride()[1:] == k.stride()[1:] == k_blocks.stride()[2:] == (dim, 1)
        and k_blocks.stride() == v_blocks.stride()
        and len(k) == len(v) == len(positions) == len(kv_slots) == tokens
        and k.shape[1:] == v.shape[1:] == k_blocks.shape[2:] == v_blocks.shape[2:]
        and k.shape[2] == dim
        and k_blocks.shape == v_blocks.shape
        and cos.dtype == sin.dtype == torch.float32
        and positions.dtype == kv_slots.dtype == torch.int64
        and cos.shape == sin.shape
        and all(t.is_contiguous() for t in (cos, sin, positions, kv_slots))
        and k_scale is None
    ):
        blocks, block_size, kv_heads, _ = k_blocks.shape
        block_stride, token_stride, _, _ = k_blocks.stride()
        args = native.RopeArgs(
            q.data_ptr(), k.data_ptr(), v.data_ptr(), q.stride(0), k.stride(0),
            cos.data_ptr(), sin.data_ptr(), positions.data_ptr(), kv_slots.data_ptr(),
            k_blocks.data_ptr(), v_blocks.data_ptr(), block_stride, token_stride,
            tokens, heads, kv_heads, dim, len(cos), blocks, block_size, code,
            torch.get_num_threads(),
        )  # fmt: skip
        calls.call(
            "rope_store_kv", args, q, k, v, cos, sin, positions, kv_slots, k_blocks, v_blocks
        )
        return
    indices.check_rope(positions, kv_slots, cos, k_blocks)
    reference.rope_store_kv_(
        q, k, v, cos, sin, positions, kv_slots, k_blocks, v_blocks, k_scale, v_scale
    )


def apply_token_mask_(logits: Tensor, mask: Tensor) -> None:
    """See `reference.apply_token_mask_`."""
    code = native.DTYPE_CODES.get(logits.dtype)
    if native.LIB is None or code is None or logits.stride(-1) != 1 or mask.stride(-1) != 1:
        return reference.apply_token_mask_(logits, mask)
    native.LIB.apply_token_mask(
        logits.data_ptr(), logits.stride(0), code, mask.data_ptr(), mask.stride(0),
        *logits.shape, torch.get_num_threads(),
    )  # fmt: skip


def top_logprobs(logits: Tensor, targets: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.top_logprobs`: in C++ two passes over a row, in torch some ten."""
    code = native.DTYPE_CODES.get(logits.dtype)
    if (
        native.LIB is not None
        and code is not None
        and top <= native.MOST_TOP
        and logits.stride(1) == 1
        and targets.dtype == torch.int64
        and targets.is_contiguous()
    ):
        rows, vocab = logits.shape
        ids = torch.empty(rows, 1 + top, dtype=torch.int64)
        ranks, logprobs = torch.empty_like(ids), torch.empty_like(ids, dtype=torch.float32)
        args = native.TopArgs(
            logits.data_ptr(), targets.data_ptr(), ids.data_ptr(), logprobs.data_ptr(),
            ranks.data_ptr(), logits.stride(0), rows, vocab, top, code, torch.get_num_threads(),
        )  # fmt: skip
        indices.refuse(native.LIB.top_logprobs(byref(args)))
        return ids, logprobs, ranks
    indices.check_targets(targets, logits.shape[1])
    return reference.top_logprobs(logits, targets, top)


_DRAW_DTYPES = (torch.float32, torch.int64, torch.float64, torch.float64, torch.int64)


def draw(logits: Tensor, *each: Tensor) -> tuple[Tensor, Tensor]:
    """See `reference.draw`, which sorts; C++ does not."""
    if logits.dtype not in native.DTYPE_CODES:
        logits = logits.float()
    rows, vocab = logits.shape
    tokens, failed = torch.empty(rows, dtype=torch.int64), torch.empty(rows, dtype=torch.bool)
    if native.LIB is not None and logits.stride(1) == 1:
        each = tuple(t.to(dtype).contiguous() for t, dtype in zip(each, _DRAW_DTYPES, strict=True))
        args = native.DrawArgs(
            tokens.data_ptr(), failed.data_ptr(), logits.data_ptr(), *(t.data_ptr() for t in each),
            logits.stride(0), rows, vocab, native.DTYPE_CODES[logits.dtype],
            torch.get_num_threads(),
        )  # fmt: skip
        native.LIB.draw(byref(args))
        return tokens, failed
    for i in range(rows):  # softmax of many rows may round otherwise
        own = logits[i : i + 1].to(torch.float32, copy=True)
        tokens[i : i + 1], failed[i : i + 1] = reference.draw(own, *(t[i : i + 1] for t in each))
    return tokens, failed


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """See `reference.linear`. The caller pads rows to a multiple of 16."""
    y = _gemm(x, weight)
    return y if bias is None else y.add_(bias)


# What `_rows_stay_apart` said of (dtype, rows, in, out, threads): a fact of the machine.
_APART: dict[tuple[torch.dtype, int, int, int, int], bool] = {}


def _gemm(x: Tensor, weight: Tensor) -> Tensor:
    """x [rows, in] @ weight.T [in, out]: each row's bits are those it has in a block of 16 rows."""
    if len(x) <= ROWS:
        return F.linear(x, weight)
    shape = (x.dtype, len(x), weight.shape[1], len(weight), torch.get_num_threads())
    if shape not in _APART:
        _APART[shape] = _rows_stay_apart(len(x), weight)
        if not _APART[shape]:
            logger.warning("torch's GEMM %s mixes rows on this CPU: it runs 16 at a time", shape)
    return F.linear(x, weight) if _APART[shape] else _by_blocks(x, weight)


def _rows_stay_apart(rows: int, weight: Tensor) -> bool:
    """Whether torch's GEMM of this shape gives what blocks of 16 rows give; tried on noise."""
    noise = torch.randn(rows, weight.shape[1], generator=torch.Generator().manual_seed(rows))
    noise = noise.to(weight.dtype)
    return torch.equal(F.linear(noise, weight), _by_blocks(noise, weight))


def _by_blocks(x: Tensor, weight: Tensor) -> Tensor:
    return torch.cat([F.linear(block, weight) for block in torch.split(x, ROWS)])
