"""The elementwise ops on CUDA, one launch each; rounded where `reference` rounds.

- `rms_norm`: `weight * round(h / sqrt(mean(h^2) + eps))`, h = x or the rounded `residual += x`; a
  token may have a weight of its own.
- `silu_mul`: `round(silu(gate)) * up` of [tokens, 2 * inter].
- `rope_store_kv_`: half-against-half rotation of q and k, and k, v into their pages.

Rows may have any stride, columns are contiguous. One program computes a row of `rms_norm` by a tile
that depends on the width alone, so bits depend on nothing else.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_EXACT: dict[str, Any] = {"enable_fp_fusion": False}  # products are rounded as `reference` rounds


@triton.jit
def _rms_norm_kernel(
    out_ptr,  # [tokens, hidden]
    x_ptr,
    residual_ptr,
    weight_ptr,
    change_ptr,  # fp32 [rows, hidden], or None
    change_row_ptr,  # int32 [tokens], or None
    stride_x_tokens,
    stride_residual_tokens,
    stride_change_rows,
    eps,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out = weight * round(h / sqrt(mean(h^2) + eps)), h = x or residual = round(residual + x).

    Grid: (tokens,). out, x and residual (or None) [tokens, HIDDEN], weight [HIDDEN]; change (or
    None) fp32 [rows, HIDDEN], of which change_row int32 [tokens] (-1 = none) chooses what is added
    to the weight; BLOCK is the power of two that holds HIDDEN.
    """
    pid_token = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    mask = offs < HIDDEN
    x = tl.load(x_ptr + pid_token * stride_x_tokens + offs, mask=mask, other=0.0)
    if residual_ptr is not None:
        residual_ptrs = residual_ptr + pid_token * stride_residual_tokens + offs
        residual = tl.load(residual_ptrs, mask=mask, other=0.0)
        x = (residual.to(tl.float32) + x.to(tl.float32)).to(residual.dtype)
        tl.store(residual_ptrs, x, mask=mask)
    h = x.to(tl.float32)
    mean = tl.sum(h * h) / HIDDEN
    h = tl.div_rn(h, tl.broadcast_to(tl.sqrt_rn(mean + eps), h.shape)).to(x.dtype)
    weight = tl.load(weight_ptr + offs, mask=mask, other=0.0)
    weight = weight.to(tl.float32)
    if change_ptr is not None:
        row = tl.load(change_row_ptr + pid_token).to(tl.int64)
        change_ptrs = change_ptr + row * stride_change_rows + offs
        weight += tl.load(change_ptrs, mask=mask & (row >= 0), other=0.0)
    out = weight * h.to(tl.float32)
    out_ptrs = out_ptr + pid_token * HIDDEN + offs
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _silu_mul_kernel(
    out_ptr,  # [tokens, inter]
    x_ptr,  # [tokens, 2 * inter]
    stride_x_tokens,
    INTER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out = round(silu(gate)) * up of x = [gate | up].

    Grid: (tokens, blocks of BLOCK columns). out [tokens, INTER], x [tokens, 2 * INTER].
    """
    pid_token = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < INTER
    x_ptrs = x_ptr + pid_token * stride_x_tokens + offs
    gate = tl.load(x_ptrs, mask=mask, other=0.0)
    up = tl.load(x_ptrs + INTER, mask=mask, other=0.0)
    wide = gate.to(tl.float32)
    silu = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype)
    out = silu.to(tl.float32) * up.to(tl.float32)
    out_ptrs = out_ptr + pid_token * INTER + offs
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _store_kv(page_ptrs, x, scale_ptr, head, mask, mask_head):
    """`x` [heads, HALF] into a page, divided by its head's scale and cut to e4m3's range."""
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + head, mask=mask_head, other=1.0)
        x = tl.div_rn(x.to(tl.float32), tl.broadcast_to(scale[:, None], x.shape))
        x = tl.minimum(tl.maximum(x, -448.0), 448.0)
    tl.store(page_ptrs, x.to(page_ptrs.dtype.element_ty), mask=mask)


# Scales of a layer may begin at any multiple of 4 bytes, and are read one by one.
@triton.jit(do_not_specialize_on_alignment=("k_scale_ptr", "v_scale_ptr"))
def _rope_store_kv_kernel(
    q_ptr,  # [tokens, heads, head_dim], rotated in place
    k_ptr,  # [tokens, kv_heads, head_dim]
    v_ptr,
    cos_ptr,  # fp32 [positions, HALF]
    sin_ptr,
    positions_ptr,
    kv_slots_ptr,
    k_blocks_ptr,  # [blocks, block_size, kv_heads, head_dim]
    v_blocks_ptr,
    k_scale_ptr,
    v_scale_ptr,
    stride_q_tokens,
    stride_q_heads,
    stride_k_tokens,
    stride_k_heads,
    stride_v_tokens,
    stride_v_heads,
    stride_angles,
    stride_k_blocks,
    stride_k_offsets,
    stride_k_block_heads,
    stride_v_blocks,
    stride_v_offsets,
    stride_v_block_heads,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    """(a, b) -> (a cos - b sin, b cos + a sin) of the halves of q and k; k and v into their pages.

    Grid: (tokens, parts); a program has BLOCK_HEADS heads of one token, those of q first, then
    those of k and v. q [tokens, HEADS, 2 * HALF], k and v [tokens, KV_HEADS, 2 * HALF], cos and sin
    fp32 [positions, HALF], positions and kv_slots int64 [tokens], k_blocks and v_blocks [blocks,
    BLOCK_SIZE, KV_HEADS, 2 * HALF], k_scale and v_scale fp32 [KV_HEADS] or None.
    """
    PARTS: tl.constexpr = (HEADS + BLOCK_HEADS - 1) // BLOCK_HEADS
    pid_token = tl.program_id(0).to(tl.int64)
    pid_part = tl.program_id(1)
    offs_dim = tl.arange(0, BLOCK_HALF)
    mask_dim = offs_dim < HALF
    offs_angle = tl.load(positions_ptr + pid_token) * stride_angles + offs_dim
    cos = tl.load(cos_ptr + offs_angle, mask=mask_dim, other=0.0)[None, :]
    sin = tl.load(sin_ptr + offs_angle, mask=mask_dim, other=0.0)[None, :]
    if pid_part < PARTS:
        head = pid_part * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
        mask = (head < HEADS)[:, None] & mask_dim[None, :]
        offs_q = pid_token * stride_q_tokens + head[:, None] * stride_q_heads + offs_dim[None, :]
        first = tl.load(q_ptr + offs_q, mask=mask, other=0.0)
        second = tl.load(q_ptr + offs_q + HALF, mask=mask, other=0.0)
        wide_first, wide_second = first.to(tl.float32), second.to(tl.float32)
        rotated = (wide_first * cos - wide_second * sin).to(first.dtype)
        tl.store(q_ptr + offs_q, rotated, mask=mask)
        rotated = (wide_second * cos + wide_first * sin).to(first.dtype)
        tl.store(q_ptr + offs_q + HALF, rotated, mask=mask)
        return
    slot = tl.load(kv_slots_ptr + pid_token)
    if slot < 0:
        return
    block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
    head = (pid_part - PARTS) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    mask_head = head < KV_HEADS
    mask = mask_head[:, None] & mask_dim[None, :]
    offs_k = pid_token * stride_k_tokens + head[:, None] * stride_k_heads + offs_dim[None, :]
    first = tl.load(k_ptr + offs_k, mask=mask, other=0.0)
    second = tl.load(k_ptr + offs_k + HALF, mask=mask, other=0.0)
    wide_first, wide_second = first.to(tl.float32), second.to(tl.float32)
    k_page = k_blocks_ptr + block * stride_k_blocks + offset * stride_k_offsets
    k_page += head[:, None] * stride_k_block_heads + offs_dim[None, :]
    rotated = (wide_first * cos - wide_second * sin).to(first.dtype)
    _store_kv(k_page, rotated, k_scale_ptr, head, mask, mask_head)
    rotated = (wide_second * cos + wide_first * sin).to(first.dtype)
    _store_kv(k_page + HALF, rotated, k_scale_ptr, head, mask, mask_head)
    offs_v = pid_token * stride_v_tokens + head[:, None] * stride_v_heads + offs_dim[None, :]
    v_page = v_blocks_ptr + block * stride_v_blocks + offset * stride_v_offsets
    v_page += head[:, None] * stride_v_block_heads + offs_dim[None, :]
    first = tl.load(v_ptr + offs_v, mask=mask, other=0.0)
    second = tl.load(v_ptr + offs_v + HALF, mask=mask, other=0.0)
    _store_kv(v_page, first, v_scale_ptr, head, mask, mask_head)
    _store_kv(v_page + HALF, second, v_scale_ptr, head, mask, mask_head)


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor | None = None,
    change: Tensor | None = None,
    change_row: Tensor | None = None,
) -> Tensor:
    """See `reference.rms_norm`."""
    hidden = x.shape[-1]
    rows, out = x.reshape(-1, hidden), x.new_empty(x.shape)
    into = None if residual is None else residual.view(-1, hidden)
    _contiguous_columns(rows, weight, rows if into is None else into)
    block = triton.next_power_of_2(hidden)
    if change is not None and (change.dtype != torch.float32 or change.stride(1) != 1):
        raise ValueError("change must be float32 with contiguous rows")
    if rows.numel():
        _rms_norm_kernel[(len(rows),)](
            out, rows, into, weight, change, change_row, rows.stride(0),
            0 if into is None else into.stride(0), 0 if change is None else change.stride(0), eps,
            HIDDEN=hidden, BLOCK=block, num_warps=min(max(block // 512, 1), 16), **_EXACT,
        )  # fmt: skip
    return out


def silu_mul(x: Tensor) -> Tensor:
    """See `reference.silu_mul`."""
    inter = x.shape[-1] // 2
    rows, out = x.reshape(-1, 2 * inter), x.new_empty((*x.shape[:-1], inter))
    _contiguous_columns(rows)
    if out.numel():
        _silu_mul_kernel[(len(rows), triton.cdiv(inter, 1024))](
            out, rows, rows.stride(0), INTER=inter, BLOCK=1024, num_warps=4, **_EXACT
        )
    return out


def rope_store_kv_(
    q: Tensor,  # [tokens, heads, head_dim], rotated in place
    k: Tensor,  # [tokens, kv_heads, head_dim]
    v: Tensor,
    cos: Tensor,  # fp32 [positions, head_dim / 2]
    sin: Tensor,
    positions: Tensor,  # int64 [tokens]
    kv_slots: Tensor,  # int64 [tokens]
    k_blocks: Tensor,  # [blocks, block_size, kv_heads, head_dim], written in place
    v_blocks: Tensor,
    k_scale: Tensor | None = None,  # fp32 [kv_heads], of e4m3 blocks
    v_scale: Tensor | None = None,
) -> None:
    """See `reference.rope_store_kv_`."""
    (tokens, heads, head_dim), kv_heads = q.shape, k.shape[1]
    _contiguous_columns(q, k, v, cos, sin, k_blocks, v_blocks)
    if cos.stride() != sin.stride():
        raise ValueError("cos and sin must have the same strides")
    block_heads = 8
    parts = triton.cdiv(heads, block_heads) + triton.cdiv(kv_heads, block_heads)
    if tokens:
        _rope_store_kv_kernel[(tokens, parts)](
            q, k, v, cos, sin, positions, kv_slots, k_blocks, v_blocks, k_scale, v_scale,
            *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], cos.stride(0),
            *k_blocks.stride()[:3], *v_blocks.stride()[:3],
            HEADS=heads, KV_HEADS=kv_heads, HALF=head_dim // 2, BLOCK_SIZE=k_blocks.shape[1],
            BLOCK_HEADS=block_heads, BLOCK_HALF=triton.next_power_of_2(head_dim // 2),
            num_warps=2, **_EXACT,
        )  # fmt: skip


def _contiguous_columns(*tensors: Tensor) -> None:
    for tensor in tensors:
        if tensor.stride(-1) != 1:
            raise ValueError(
                f"a {tuple(tensor.shape)} tensor is not contiguous in its last dimension"
            )
