"""LoRA on CUDA in Triton: SGMV for tiles of up to 64 rows, BGMV for tiles of up to 16.

`lora_`: `y[t] = round(c * y[t] + sum_p B[p]^T round(w_p * A[p] x[t]) + bias)` over the pages p of
t's slot, in fp32. Shrink writes fp32 planes, one for each part of K; expand sums them in order.

x [tokens, in], y [tokens, out] with contiguous rows; pages dense inside, with any stride(0); tables
and tiles as in `tiles`. Programs read all counts from device memory, so that a CUDA graph may be
replayed with other segments; those beyond `num_tiles` leave after one load.

Rows do not influence each other: no atomics, sums in a fixed order, and one family of matrix
instructions (mma.sync) for both tile heights, for which plans keep 64 rows from 4 warps.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tiles import Table, Tiles
from .launch_plans import CudaTarget

PAGE = 8
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Numbers that differ from step to step, or from site to site for nothing, are not specialised: no
# variant is compiled for one that is 1, or a multiple of 16. Tiles are read one by one.
_TILES = ("tile_slots_ptr", "tile_starts_ptr", "tile_lens_ptr", "num_tiles_ptr")


@triton.jit(
    do_not_specialize=("num_tokens", "num_slices", "max_pages", "stride_page_ids"),
    do_not_specialize_on_alignment=_TILES,
)
def _shrink_kernel(
    x_ptr, a_ptr, planes_ptr,
    page_ids_ptr, num_pages_ptr,
    tile_slots_ptr, tile_starts_ptr, tile_lens_ptr, num_tiles_ptr,
    K, num_tokens, num_slices, max_pages,
    stride_x_tokens, stride_a_pages, stride_page_ids,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_PAGES: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """planes[split, token, (slice, page, r)] = A[page, slice, r, part of K] @ x[token, part of K].

    Grid: (tile, column program, split). The columns of all slices form one list of num_slices *
    num_pages pages, so one pass over x serves them; a column program takes every num_programs(1)-th
    group of BLOCK_PAGES pages of it, as many as the slot's rank has.

    x [num_tokens, K], a [pages, num_slices, 8, K], planes fp32 [splits, num_tokens, num_slices *
    max_pages * 8], page_ids [slots, max_pages], num_pages [slots], tile_slots, tile_starts and
    tile_lens [capacity], num_tiles [1], all int32. Strides are in elements, from row to row.
    """
    pid_tile = tl.program_id(0)
    pid_n = tl.program_id(1)
    pid_k = tl.program_id(2)
    if pid_tile >= tl.load(num_tiles_ptr):
        return
    slot = tl.load(tile_slots_ptr + pid_tile).to(tl.int64)
    start = tl.load(tile_starts_ptr + pid_tile).to(tl.int64)
    length = tl.load(tile_lens_ptr + pid_tile)
    num_pages = tl.load(num_pages_ptr + slot)

    per_split = tl.cdiv(tl.cdiv(K, BLOCK_K), tl.num_programs(2)) * BLOCK_K
    k_first = pid_k * per_split
    k_last = min(K, k_first + per_split)
    offs_n = tl.arange(0, BLOCK_PAGES * 8)
    offs_r = offs_n % 8
    num_columns = num_slices * max_pages * 8

    all_pages = num_slices * num_pages
    for first in range(pid_n * BLOCK_PAGES, all_pages, tl.num_programs(1) * BLOCK_PAGES):
        offs_page = first + offs_n // 8
        mask_n = offs_page < all_pages
        in_slice = offs_page // num_pages
        page = offs_page % num_pages
        page_id = tl.load(page_ids_ptr + slot * stride_page_ids + page, mask=mask_n, other=0)
        a_rows = a_ptr + page_id.to(tl.int64) * stride_a_pages + (in_slice * 8 + offs_r) * K
        columns = (in_slice * max_pages + page) * 8 + offs_r
        for row in range(0, length, BLOCK_M):
            offs_m = row + tl.arange(0, BLOCK_M)
            mask_m = offs_m < length
            x_rows = x_ptr + (start + offs_m) * stride_x_tokens
            acc = tl.zeros([BLOCK_M, BLOCK_PAGES * 8], tl.float32)
            for k in range(k_first, k_last, BLOCK_K):
                offs_k = k + tl.arange(0, BLOCK_K)
                mask_x = mask_m[:, None]
                mask_a = mask_n[None, :]
                if not EVEN_K:
                    mask_x = mask_x & (offs_k < K)[None, :]
                    mask_a = mask_a & (offs_k < K)[:, None]
                x = tl.load(x_rows[:, None] + offs_k[None, :], mask=mask_x, other=0.0)
                a = tl.load(a_rows[None, :] + offs_k[:, None], mask=mask_a, other=0.0)
                if x.dtype != a.dtype:
                    x = x.to(tl.float32)
                    a = a.to(tl.float32)
                acc = tl.dot(x, a, acc, input_precision="ieee")
            planes = planes_ptr + (pid_k.to(tl.int64) * num_tokens + start + offs_m) * num_columns
            mask = mask_m[:, None] & mask_n[None, :]
            tl.store(planes[:, None] + columns[None, :], acc, mask=mask)


@triton.jit(
    do_not_specialize=(
        "max_pages", "pages_u", "pages_planes", "stride_page_ids", "stride_page_weights",
    ),
    do_not_specialize_on_alignment=_TILES,
)  # fmt: skip
def _expand_kernel(
    y_ptr, u_ptr, b_ptr, ids_ptr,
    page_ids_ptr, page_weights_ptr, num_pages_ptr,
    scale_row_ptr, scale_ptr, bias_ptr,
    tile_slots_ptr, tile_starts_ptr, tile_lens_ptr, num_tiles_ptr,
    max_pages,
    stride_y_tokens, pages_u, pages_planes, stride_b_pages, stride_page_ids, stride_page_weights,
    stride_scale_rows, stride_bias_rows,
    STARTS: tl.constexpr, NUM_SLICES: tl.constexpr, NUM_BLOCKS: tl.constexpr, ALIGN: tl.constexpr,
    SPLIT_K: tl.constexpr, GATHER: tl.constexpr, USE_SCALE: tl.constexpr, USE_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_PAGES: tl.constexpr,
):  # fmt: skip
    """y[token, n] = round(c * y + sum over pages of round(weight * u[token]) @ B[page] + bias).

    Grid: (programs,), each taking every num_programs-th (tile, column block), of NUM_BLOCKS column
    blocks, none of which crosses a slice. u are planes [SPLIT_K, tokens, (slice, page, r)], or with
    GATHER embedding pages [pages, vocab, 8] of which ids choose the rows.

    y [tokens, out], b [pages, 8, out], ids int64 [tokens] or None, page_ids int32 and page_weights
    fp32 [slots, max_pages], num_pages and scale_row int32 [slots], scale and bias [rows, out] or
    None, tiles as above. STARTS are the first columns of the slices, and out; ALIGN divides them.
    """
    stride_u = pages_u * 8  # in whole pages: this is how the compiler knows that loads can be wide
    stride_planes = pages_planes * 8
    offs_n = tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_PAGES * 8)
    num_work = tl.load(num_tiles_ptr) * NUM_BLOCKS
    for work in range(tl.program_id(0), num_work, tl.num_programs(0)):
        tile = work // NUM_BLOCKS
        block = work % NUM_BLOCKS
        slot = tl.load(tile_slots_ptr + tile).to(tl.int64)
        start = tl.load(tile_starts_ptr + tile).to(tl.int64)
        length = tl.load(tile_lens_ptr + tile)
        num_pages = tl.load(num_pages_ptr + slot)
        scale_row = tl.full((), -1, tl.int32)
        if USE_SCALE or USE_BIAS:
            scale_row = tl.load(scale_row_ptr + slot)
        if (num_pages == 0) & (scale_row < 0):
            length = 0

        in_slice = 0
        n_first = 0
        n_last = 0
        before = 0
        for s in tl.static_range(NUM_SLICES):
            here = block >= before
            in_slice = tl.where(here, s, in_slice)
            n_first = tl.where(here, STARTS[s] + (block - before) * BLOCK_N, n_first)
            n_last = tl.where(here, STARTS[s + 1], n_last)
            before += (STARTS[s + 1] - STARTS[s] + BLOCK_N - 1) // BLOCK_N
        n_first = tl.multiple_of(n_first, ALIGN)
        n_last = tl.multiple_of(n_last, ALIGN)
        columns = n_first + offs_n
        mask_n = columns < n_last

        for row in range(0, length, BLOCK_M):
            offs_m = row + tl.arange(0, BLOCK_M)
            mask_m = offs_m < length
            tokens = start + offs_m
            mask = mask_m[:, None] & mask_n[None, :]
            y_tile = y_ptr + tokens[:, None] * stride_y_tokens + columns[None, :]
            y = tl.load(y_tile, mask=mask, other=0.0)
            if GATHER:
                ids = tl.load(ids_ptr + tokens, mask=mask_m, other=0)
            acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for first in range(0, num_pages, BLOCK_PAGES):
                page = first + offs_k // 8
                offs_r = offs_k % 8
                mask_k = page < num_pages
                page_id = tl.load(
                    page_ids_ptr + slot * stride_page_ids + page, mask=mask_k, other=0
                ).to(tl.int64)
                weight = tl.load(
                    page_weights_ptr + slot * stride_page_weights + page, mask=mask_k, other=0.0
                )
                mask_b = mask_k[:, None] & mask_n[None, :]
                b_rows = b_ptr + page_id * stride_b_pages + offs_r * STARTS[NUM_SLICES]
                b = tl.load(b_rows[:, None] + columns[None, :], mask=mask_b, other=0.0)
                mask_u = mask_m[:, None] & mask_k[None, :]
                if GATHER:
                    u_rows = u_ptr + page_id[None, :] * stride_u + ids[:, None] * 8
                    u = tl.load(u_rows + offs_r[None, :], mask=mask_u, other=0.0).to(tl.float32)
                else:
                    u_columns = (in_slice * max_pages + page) * 8 + offs_r
                    u_rows = u_ptr + tokens[:, None] * stride_u + u_columns[None, :]
                    u = tl.load(u_rows, mask=mask_u, other=0.0)
                    for _ in tl.static_range(SPLIT_K - 1):
                        u_rows += stride_planes
                        u += tl.load(u_rows, mask=mask_u, other=0.0)
                u = (u * weight[None, :]).to(b.dtype)
                acc = tl.dot(u, b, acc, input_precision="ieee")
            y = y.to(tl.float32)
            own = (scale_row >= 0) & mask_n
            if USE_SCALE:
                scale = scale_ptr + scale_row.to(tl.int64) * stride_scale_rows + columns
                y *= tl.load(scale, mask=own, other=1.0).to(tl.float32)[None, :]
            y += acc
            if USE_BIAS:
                bias = bias_ptr + scale_row.to(tl.int64) * stride_bias_rows + columns
                added = y + tl.load(bias, mask=own, other=0.0).to(tl.float32)[None, :]
                y = tl.where(scale_row >= 0, added, y)
            tl.store(y_tile, y.to(y_ptr.dtype.element_ty), mask=mask)


def lora_shrink(
    x: Tensor,  # [tokens, in]
    a_pages: Tensor,  # [pages, slices, 8, in]
    table: Table,
    tiles: Tiles,
    split_k: int,
    device: CudaTarget,
) -> Tensor:  # [split_k, tokens, slices * max_pages * 8], fp32; undefined beyond a row's pages
    """See `reference.lora_shrink`."""
    _check(x=x, table=table, tiles=tiles, a_pages=a_pages)
    slices, in_ = a_pages.shape[1], a_pages.shape[3]
    max_pages = table.page_ids.shape[1]
    planes = torch.empty(
        (split_k, len(x), slices * max_pages * PAGE), dtype=torch.float32, device=x.device
    )
    if not len(x) or not len(tiles.slots) or not max_pages:
        return planes
    plan = device.plans.choose("lora_shrink", (in_, slices), len(x))
    groups = triton.cdiv(slices * max_pages, plan["block_pages"])
    grid = (len(tiles.slots), min(groups, plan["column_programs"]), split_k)
    _shrink_kernel[grid](
        x, a_pages, planes,
        table.page_ids, table.num_pages, *tiles,
        in_, len(x), slices, max_pages,
        x.stride(0), a_pages.stride(0), table.page_ids.stride(0),
        EVEN_K=in_ % plan["block_k"] == 0,
        BLOCK_M=plan["block_m"], BLOCK_PAGES=plan["block_pages"], BLOCK_K=plan["block_k"],
        num_warps=plan["num_warps"], num_stages=plan["num_stages"], enable_fp_fusion=False,
    )  # fmt: skip
    return planes


def lora_expand_(
    y: Tensor,  # [tokens, out], changed in place
    planes: Tensor,  # [split_k, tokens, slices * max_pages * 8], fp32
    b_pages: Tensor,  # [pages, 8, out]
    table: Table,
    tiles: Tiles,
    slice_starts: Sequence[int],  # [slices + 1]
    device: CudaTarget,
) -> None:
    """See `reference.lora_expand_`."""
    if planes.dtype != torch.float32 or not planes.is_contiguous():
        raise ValueError("planes must be contiguous float32, as lora_shrink makes them")
    _expand_(y, planes, None, b_pages, table, tiles, tuple(slice_starts), device)


def lora_(
    y: Tensor,  # [tokens, out], changed in place
    x: Tensor,  # [tokens, in]
    a_pages: Tensor,  # [pages, slices, 8, in]
    b_pages: Tensor,  # [pages, 8, out]
    table: Table,
    tiles: Tiles,
    slice_starts: Sequence[int],
    device: CudaTarget,
) -> None:
    """See `reference.lora_`."""
    split_k = splits(x, a_pages, device)
    planes = lora_shrink(x, a_pages, table, tiles, split_k, device)
    lora_expand_(y, planes, b_pages, table, tiles, slice_starts, device)


def lora_embed_(
    y: Tensor,  # [tokens, hidden], changed in place
    ids: Tensor,  # int64 [tokens]
    a_pages: Tensor,  # [pages, vocab, 8]
    b_pages: Tensor,  # [pages, 8, hidden]
    table: Table,
    tiles: Tiles,
    device: CudaTarget,
) -> None:
    """See `reference.lora_embed_`: one launch, which takes A's rows where planes would be."""
    _check(a_pages=a_pages)
    _expand_(y, a_pages, ids, b_pages, table, tiles, (0, y.shape[1]), device)


def splits(x: Tensor, a_pages: Tensor, device: CudaTarget) -> int:
    """The parts of K that `lora_` sums apart: by the shape alone, never by the number of rows."""
    plan = device.plans.choose("lora_shrink", (a_pages.shape[3], a_pages.shape[1]), len(x))
    return min(plan["split_k"], -(-a_pages.shape[3] // plan["block_k"]))


def _expand_(
    y: Tensor,
    u: Tensor,  # planes, or with ids the A pages of an embedding
    ids: Tensor | None,
    b_pages: Tensor,
    table: Table,
    tiles: Tiles,
    starts: tuple[int, ...],
    device: CudaTarget,
) -> None:
    _check(y=y, table=table, tiles=tiles, b_pages=b_pages)
    max_pages = table.page_ids.shape[1]
    if not len(y) or not len(tiles.slots):
        return
    plan = device.plans.choose("lora_expand", (starts[-1], len(starts) - 1), len(y))
    block_n = plan["block_n"]
    blocks = sum(triton.cdiv(last - first, block_n) for first, last in pairwise(starts))
    programs = min(len(tiles.slots) * blocks, device.num_sms * plan["programs_per_sm"])
    scale, bias = (None, None) if table.scale_row is None else (table.scale, table.bias)
    _expand_kernel[(programs,)](
        y, u, b_pages, ids,
        *table[:4], scale, bias, *tiles,
        max_pages,
        y.stride(0), u.stride(0 if ids is not None else 1) // PAGE, u.stride(0) // PAGE,
        b_pages.stride(0),
        table.page_ids.stride(0), table.page_weights.stride(0),
        0 if scale is None else scale.stride(0), 0 if bias is None else bias.stride(0),
        STARTS=starts, NUM_SLICES=len(starts) - 1, NUM_BLOCKS=blocks,
        ALIGN=_alignment(starts, block_n), SPLIT_K=1 if ids is not None else len(u),
        GATHER=ids is not None, USE_SCALE=scale is not None, USE_BIAS=bias is not None,
        BLOCK_M=plan["block_m"], BLOCK_N=block_n, BLOCK_PAGES=plan["block_pages"],
        num_warps=plan["num_warps"], num_stages=plan["num_stages"], enable_fp_fusion=False,
    )  # fmt: skip


def _alignment(starts: tuple[int, ...], block_n: int) -> int:
    """The power of two, at most `block_n`, that divides every slice's first column."""
    align = block_n
    while any(start % align for start in starts):
        align //= 2
    return align


def _check(table: Table | None = None, tiles: Tiles | None = None, **tensors: Tensor) -> None:
    """ValueError for layouts that the kernels cannot address; shapes are the ops' business."""
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            known = ", ".join(str(dtype) for dtype in DTYPES)
            raise ValueError(f"{name} is {tensor.dtype}; on CUDA it must be one of {known}")
        one = tensor[:1]
        dense = torch.empty(one.shape, device="meta").stride()[1:]
        if len(tensor) and tensor.numel() and one.stride()[1:] != dense:
            raise ValueError(f"{name} must be contiguous but for its first dimension")
    rows = [] if table is None else [table.page_ids, table.page_weights, table.scale, table.bias]
    if any(t is not None and t.shape[1] > 1 and t.stride(1) != 1 for t in rows):
        raise ValueError("the tensors of a table must have contiguous rows")
    flat = [] if table is None else [table.num_pages, table.scale_row]
    flat += [] if tiles is None else list(tiles)
    if any(t is not None and not t.is_contiguous() for t in flat):
        raise ValueError("num_pages, scale_row and the tensors of tiles must be contiguous")
