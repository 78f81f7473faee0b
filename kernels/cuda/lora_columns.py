"""Single trained columns of a linear on CUDA in Triton: see `reference.lora_columns_`.

One program has 32 columns of one tile's slot and sums over K in one order, so a row's bits do not
depend on the rows beside it. x, y and weights have contiguous rows; tiles are as in `lora`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..tiles import Columns, Tiles

BLOCK_M, BLOCK_N, BLOCK_K = 16, 32, 64


@triton.jit(
    do_not_specialize=("max_columns",),
    do_not_specialize_on_alignment=(
        "tile_slots_ptr", "tile_starts_ptr", "tile_lens_ptr", "num_tiles_ptr",
    ),
)  # fmt: skip
def _columns_kernel(
    y_ptr, x_ptr,
    column_ids_ptr, num_columns_ptr, weights_ptr,
    tile_slots_ptr, tile_starts_ptr, tile_lens_ptr, num_tiles_ptr,
    max_columns,
    stride_y_tokens, stride_x_tokens, stride_w_slots,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y[token, column_ids[slot, c]] += weights[slot, c] @ x[token], rounded once.

    Grid: (tile, columns / BLOCK_N). y [tokens, out], x [tokens, K], column_ids int32 [slots,
    max_columns], num_columns int32 [slots], weights [slots, max_columns, K]; tile_slots,
    tile_starts and tile_lens int32 [capacity], num_tiles int32 [1]. Strides are in elements.
    """
    pid_tile = tl.program_id(0)
    if pid_tile >= tl.load(num_tiles_ptr):
        return
    slot = tl.load(tile_slots_ptr + pid_tile).to(tl.int64)
    first = tl.program_id(1) * BLOCK_N
    count = tl.load(num_columns_ptr + slot)
    if first >= count:
        return
    start = tl.load(tile_starts_ptr + pid_tile).to(tl.int64)
    length = tl.load(tile_lens_ptr + pid_tile)
    column = first + tl.arange(0, BLOCK_N)
    mask_n = column < count
    ids = tl.load(column_ids_ptr + slot * max_columns + column, mask=mask_n, other=0)
    w_rows = weights_ptr + slot * stride_w_slots + column * K
    offs_k = tl.arange(0, BLOCK_K)
    for row in range(0, length, BLOCK_M):
        offs_m = row + tl.arange(0, BLOCK_M)
        mask_m = offs_m < length
        x_rows = x_ptr + (start + offs_m) * stride_x_tokens
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k in range(0, K, BLOCK_K):
            mask_k = k + offs_k < K
            x_ptrs = x_rows[:, None] + (k + offs_k)[None, :]
            x = tl.load(x_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
            w_ptrs = w_rows[None, :] + (k + offs_k)[:, None]
            w = tl.load(w_ptrs, mask=mask_n[None, :] & mask_k[:, None], other=0.0)
            if x.dtype != w.dtype:
                x = x.to(tl.float32)
                w = w.to(tl.float32)
            acc = tl.dot(x, w, acc, input_precision="ieee")
        mask = mask_m[:, None] & mask_n[None, :]
        y_ptrs = y_ptr + (start + offs_m)[:, None] * stride_y_tokens + ids[None, :]
        y = tl.load(y_ptrs, mask=mask, other=0.0).to(tl.float32) + acc
        tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=mask)


def lora_columns_(
    y: Tensor,  # [tokens, out], changed in place
    x: Tensor,  # [tokens, in]
    changes: Columns,
    tiles: Tiles,
) -> None:
    """See `reference.lora_columns_`."""
    ids, counts, weights = changes
    dense = weights.stride(2) == 1 and weights.stride(1) == weights.shape[2]
    if not (y.stride(1) == x.stride(1) == 1 and dense and ids.is_contiguous()):
        raise ValueError("x, y and a slot's weights must have contiguous rows")
    if not len(y) or not len(tiles.slots) or not ids.shape[1]:
        return
    _columns_kernel[(len(tiles.slots), triton.cdiv(ids.shape[1], BLOCK_N))](
        y, x, ids, counts, weights, *tiles,
        ids.shape[1], y.stride(0), x.stride(0), weights.stride(0),
        K=x.shape[1], BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K,
        num_warps=4, num_stages=3, enable_fp_fusion=False,
    )  # fmt: skip
