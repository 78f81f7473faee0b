"""Norms, activations, rotary positions and the KV store on CPU: in C++ and in vectorised torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import index_checks, reference
from . import graph, native
from .row_independence import flat


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    change: Tensor | None = None,
    change_row: Tensor | None = None,
) -> Tensor:
    """See `reference.rms_norm`."""
    return _rms_norm(x, weight, eps, None, change, change_row)


def add_rms_norm_(
    residual: Tensor,
    x: Tensor,
    weight: Tensor,
    eps: float,
    change: Tensor | None = None,
    change_row: Tensor | None = None,
) -> Tensor:
    """See `reference.rms_norm`, with a residual."""
    return _rms_norm(x, weight, eps, residual, change, change_row)


def _rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor | None,
    change: Tensor | None,
    change_row: Tensor | None,
) -> Tensor:
    """Square roots and quotients are exact in any code path."""
    code, like = native.DTYPE_CODES.get(x.dtype), x if residual is None else residual
    if (
        native.LIB is not None
        and code is not None
        and x.dtype == weight.dtype == like.dtype
        and x.dim() == 2
        and x.shape == like.shape
        and x.stride(1) == like.stride(1) == weight.stride(0) == 1
        and (change is None or change_row is None or _is_change(change, change_row))
    ):
        out = graph.empty(x.shape, x.dtype)
        args = native.NormArgs(
            out=out.data_ptr(),
            x=x.data_ptr(),
            residual=native.pointer(residual),
            weight=weight.data_ptr(),
            change=native.pointer(change),
            change_row=native.pointer(change_row),
            x_stride=x.stride(0),
            residual_stride=like.stride(0),
            change_stride=0 if change is None else change.stride(0),
            change_rows=0 if change is None else len(change),
            tokens=len(x),
            hidden=x.shape[1],
            eps=eps,
            dtype=code,
            num_threads=torch.get_num_threads(),
        )
        graph.call("rms_norm", args, out, x, residual, weight, change, change_row)
        return out
    if change is not None and change_row is not None:
        index_checks.check_changes(change, change_row)
    if residual is not None:
        residual.add_(x)
        x = residual
    h = x.float()
    variance = h.square().mean(-1, keepdim=True)
    h = (h / (variance + eps).sqrt()).to(x.dtype)
    if change is None or change_row is None:
        return (weight * h).contiguous()
    own = weight.float() + change[change_row.clamp(min=0).long()]
    own = torch.where((change_row >= 0)[:, None], own, weight.float())
    return (own * h.float()).to(x.dtype).contiguous()


def _is_change(change: Tensor, change_row: Tensor) -> bool:
    """Whether trained norms are of the types and layouts that the C++ form takes."""
    return (
        change.dtype == torch.float32
        and change_row.dtype == torch.int32
        and change.stride(1) == 1
        and change_row.is_contiguous()
    )


def silu_mul(x: Tensor) -> Tensor:
    """See `reference.silu_mul`."""
    code = native.DTYPE_CODES.get(x.dtype)
    if native.LIB is not None and code is not None and x.dim() == 2 and x.stride(1) == 1:
        tokens, inter = x.shape[0], x.shape[1] // 2
        out = graph.empty((tokens, inter), x.dtype)
        args = native.SiluArgs(
            out=out.data_ptr(),
            x=x.data_ptr(),
            x_stride=x.stride(0),
            tokens=tokens,
            inter=inter,
            dtype=code,
            num_threads=torch.get_num_threads(),
        )
        graph.call("silu_mul", args, out, x)
        return out
    gate, up = x.chunk(2, -1)
    return flat(F.silu, gate.float()).to(x.dtype).mul_(up)


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
            q=q.data_ptr(),
            k=k.data_ptr(),
            v=v.data_ptr(),
            q_stride=q.stride(0),
            kv_stride=k.stride(0),
            cos=cos.data_ptr(),
            sin=sin.data_ptr(),
            positions=positions.data_ptr(),
            kv_slots=kv_slots.data_ptr(),
            k_blocks=k_blocks.data_ptr(),
            v_blocks=v_blocks.data_ptr(),
            block_stride=block_stride,
            token_stride=token_stride,
            tokens=tokens,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=dim,
            max_position=len(cos),
            blocks=blocks,
            block_size=block_size,
            dtype=code,
            num_threads=torch.get_num_threads(),
        )
        graph.call(
            "rope_store_kv", args, q, k, v, cos, sin, positions, kv_slots, k_blocks, v_blocks
        )
        return
    index_checks.check_rope(positions, kv_slots, cos, k_blocks)
    reference.rope_store_kv_(
        q, k, v, cos, sin, positions, kv_slots, k_blocks, v_blocks, k_scale, v_scale
    )
