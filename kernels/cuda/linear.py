"""Batch-invariant matrix product on CUDA: `y = x @ weight.T`, one order of sums for any row count.

x [tokens, in], weight [out, in], in fp16, bf16 or fp32 with columns contiguous; sums in fp32,
rounded once. cuBLAS chooses kernels and splits K by the number of rows, so a row's bits depend on
how many rows are with it; here K is walked in steps of BLOCK_K from 0, never split.

Row tiles are 64 or 128 high and column tiles 32 or 128 wide. On Hopper all of them are wgmma of 64
rows with the same K steps, and an element's sum does not depend on the tile that it stands in.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .launch_plans import MATMUL_ROWS

BLOCK_K = 64


class Schedule(NamedTuple):
    """What only places the work."""

    rows: int
    columns: int
    warps: int
    stages: int


@triton.jit(do_not_specialize=("tokens",))
def _matmul_kernel(
    y_ptr,  # [tokens, out]
    x_ptr,  # [tokens, in]
    weight_ptr,  # [out, in]
    tokens,
    columns,
    inner,
    stride_y_tokens,
    stride_x_tokens,
    stride_weight_out,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,  # inner is a multiple of BLOCK_K
    PRECISION: tl.constexpr,
):
    """y[m, n] = round(sum over k from 0 up of x[m, k] * weight[n, k]), summed in fp32.

    Grid: (row tiles of BLOCK_M, column tiles of BLOCK_N). y [tokens, columns], x [tokens, inner],
    weight [columns, inner].
    """
    # Row tiles are neighbours, so that a tile of the weight is read from memory once.
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m, mask_n = (offs_m < tokens)[:, None], (offs_n < columns)[None, :]
    x_ptrs = x_ptr + offs_m[:, None] * stride_x_tokens + offs_k[None, :]
    weight_ptrs = weight_ptr + offs_n[None, :] * stride_weight_out + offs_k[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, inner, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs, mask=mask_m, other=0.0)
            weight = tl.load(weight_ptrs, mask=mask_n, other=0.0)
        else:
            mask_k = start + offs_k < inner
            x = tl.load(x_ptrs, mask=mask_m & mask_k[None, :], other=0.0)
            weight = tl.load(weight_ptrs, mask=mask_n & mask_k[:, None], other=0.0)
        acc = tl.dot(x, weight, acc, input_precision=PRECISION)
        x_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K
    y_ptrs = y_ptr + offs_m[:, None] * stride_y_tokens + offs_n[None, :]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask_m & mask_n)


def schedule(tokens: int, itemsize: int) -> Schedule:
    """Tile heights and widths by the number of rows; none of it enters a row's arithmetic."""
    if itemsize == 4:  # for tests
        return Schedule(64, 64, 4, 2)
    few, some = MATMUL_ROWS
    if tokens <= few:  # reads the weight once: as many programs as a GPU has multiprocessors
        return Schedule(64, 32, 4, 5)
    return Schedule(64, 128, 4, 4) if tokens <= some else Schedule(128, 128, 8, 4)


def matmul(x: Tensor, weight: Tensor) -> Tensor:
    """`x @ weight.T`, [..., in] times [out, in]; a row's bits do not depend on the other rows."""
    if weight.dtype != x.dtype:
        raise ValueError(f"weight is {weight.dtype}, x is {x.dtype}: cast one of them")
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    y = x.new_empty((*x.shape[:-1], len(weight)))
    if rows.stride(-1) != 1 or weight.stride(-1) != 1:
        raise ValueError("x and weight must be contiguous in their last dimension")
    if not y.numel():
        return y
    plan = schedule(len(rows), x.itemsize)
    grid = (triton.cdiv(len(rows), plan.rows), triton.cdiv(len(weight), plan.columns))
    _matmul_kernel[grid](
        y, rows, weight, len(rows), len(weight), x.shape[-1],
        len(weight), rows.stride(0), weight.stride(0),
        BLOCK_M=plan.rows, BLOCK_N=plan.columns, BLOCK_K=BLOCK_K,
        EVEN_K=x.shape[-1] % BLOCK_K == 0, PRECISION="ieee" if x.itemsize == 4 else "tf32",
        num_warps=plan.warps, num_stages=plan.stages, enable_fp_fusion=False,
    )  # fmt: skip
    return y
