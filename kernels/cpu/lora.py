"""The LoRA ops on CPU: in C++, and in vectorised torch where that cannot do it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from ctypes import addressof, c_int64

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import index_checks, reference
from ..tiles import PAGE_ROWS, Columns, Table, Tiles
from . import graph, native
from .row_independence import ROWS, padded


def lora_shrink(x: Tensor, a_pages: Tensor, table: Table, tiles: Tiles, split_k: int) -> Tensor:
    """See `reference.lora_shrink`; the stages apart are for tests and benches."""
    index_checks.check_lora(table, tiles, len(x), len(a_pages))
    return reference.lora_shrink(x, a_pages, table, tiles, split_k)


def lora_expand_(
    y: Tensor,
    planes: Tensor,
    b_pages: Tensor,
    table: Table,
    tiles: Tiles,
    slice_starts: Sequence[int],
) -> None:
    """See `reference.lora_expand_`."""
    index_checks.check_lora(table, tiles, len(y), len(b_pages))
    reference.lora_expand_(y, planes, b_pages, table, tiles, slice_starts)


class _Batch:
    """The tiles of a call as padded row blocks: tile i is rows[i], 16 or a multiple of it."""

    def __init__(self, tiles: Tiles, table: Table) -> None:
        count = int(tiles.num_tiles)
        some = tiles.lens[:count].nonzero()[:, 0]  # an empty tile is none
        lens = tiles.lens[some].long()
        width = padded(int(lens.max())) if len(some) else ROWS
        lane = torch.arange(width)
        self.real = lane < lens[:, None]  # [tiles, width]
        # Padding repeats a tile's first row and is dropped at the end.
        self.rows = tiles.starts[some].long()[:, None] + torch.where(self.real, lane, 0)
        self.slots = tiles.slots[some].long()
        self.pages = table.num_pages[self.slots]


def lora_(
    y: Tensor,
    x: Tensor,
    a_pages: Tensor,
    b_pages: Tensor,
    table: Table,
    tiles: Tiles,
    slice_starts: Sequence[int],
) -> None:
    """See `reference.lora_`: for each page ordinal, all tiles that have such a page at once."""
    if (
        native.LIB is not None
        and y.dtype == x.dtype
        and y.stride(1) == x.stride(1) == 1
        and _cpp_can(y, a_pages, b_pages, table, tiles)
    ):
        _cpp_lora(y, x, None, a_pages, b_pages, table, tiles, slice_starts)
        return
    index_checks.check_lora(table, tiles, len(y), min(len(a_pages), len(b_pages)))
    batch = _Batch(tiles, table)

    def shrink(chosen: Tensor, page_ids: Tensor) -> Tensor:
        a = a_pages[page_ids].flatten(1, 2).float()  # [tiles, slices * 8, in]
        return torch.bmm(x[batch.rows[chosen]].float(), a.transpose(1, 2))

    _expand(y, b_pages, table, batch, slice_starts, shrink)


def lora_embed_(
    y: Tensor, ids: Tensor, a_pages: Tensor, b_pages: Tensor, table: Table, tiles: Tiles
) -> None:
    """See `reference.lora_embed_`."""
    if (
        native.LIB is not None
        and y.stride(1) == 1
        and ids.dtype == torch.int64
        and ids.is_contiguous()
        and _cpp_can(y, a_pages, b_pages, table, tiles)
    ):
        _cpp_lora(y, None, ids, a_pages, b_pages, table, tiles, (0, y.shape[1]))
        return
    index_checks.check_lora(table, tiles, len(y), min(len(a_pages), len(b_pages)))
    index_checks.check_ids(ids, tiles, a_pages.shape[1])
    batch = _Batch(tiles, table)

    def shrink(chosen: Tensor, page_ids: Tensor) -> Tensor:
        return a_pages[page_ids[:, None], ids[batch.rows[chosen]]].float()

    _expand(y, b_pages, table, batch, (0, y.shape[1]), shrink)


def lora_columns_(y: Tensor, x: Tensor, changes: Columns, tiles: Tiles) -> None:
    """See `reference.lora_columns_`."""
    ids, counts, weights = changes
    if (
        native.LIB is not None
        and y.dtype == x.dtype
        and y.dtype in native.DTYPE_CODES
        and weights.dtype in native.DTYPE_CODES
        and y.stride(1) == x.stride(1) == 1
        and _is_dense(weights)
        and all(t.dtype == torch.int32 and t.is_contiguous() for t in (ids, counts, *tiles))
    ):
        _cpp_columns(y, x, changes, tiles)
        return
    index_checks.check_columns(changes, tiles, *y.shape)
    for slot, start, rows in list(zip(*tiles[:3], strict=True))[: int(tiles.num_tiles)]:
        # As many rows, and columns, as make torch's products treat each alike.
        some = slice(int(start), int(start) + int(rows))
        own = F.pad(x[some].float(), (0, 0, 0, padded(int(rows)) - int(rows)))
        count = int(counts[slot])
        columns = ids[slot, :count].long()
        of_slot = F.pad(weights[slot, :count].float(), (0, 0, 0, padded(count) - count))
        delta = (own @ of_slot.T)[: int(rows), :count]
        y[some, columns] = (y[some, columns].float() + delta).to(y.dtype)


def _cpp_columns(y: Tensor, x: Tensor, changes: Columns, tiles: Tiles) -> None:
    ids, counts, weights = changes
    slots, starts, lens, num_tiles = tiles
    args = native.ColumnsArgs(
        y=y.data_ptr(),
        x=x.data_ptr(),
        y_stride=y.stride(0),
        x_stride=x.stride(0),
        tokens=len(y),
        in_=x.shape[1],
        out=y.shape[1],
        column_ids=ids.data_ptr(),
        num_columns=counts.data_ptr(),
        weights=weights.data_ptr(),
        slots=len(counts),
        max_columns=ids.shape[1],
        weights_stride=weights.stride(0),
        tile_slots=slots.data_ptr(),
        tile_starts=starts.data_ptr(),
        tile_lens=lens.data_ptr(),
        num_tiles=num_tiles.data_ptr(),
        tiles=len(slots),
        dtype=native.DTYPE_CODES[y.dtype],
        weights_dtype=native.DTYPE_CODES[weights.dtype],
        num_threads=torch.get_num_threads(),
    )
    graph.call("lora_columns", args, y, x, *changes, *tiles)


def _cpp_can(y: Tensor, a_pages: Tensor, b_pages: Tensor, table: Table, tiles: Tiles) -> bool:
    """Whether types and layouts are those that the C++ form takes."""
    page_ids, page_weights, num_pages, scale_row, scale, bias = table
    slots, starts, lens, num_tiles = tiles
    return (
        y.dtype in native.DTYPE_CODES
        and a_pages.dtype in native.DTYPE_CODES
        and a_pages.dtype == b_pages.dtype
        and _is_dense(a_pages)
        and _is_dense(b_pages)
        and page_ids.dim() == 2
        and page_ids.dtype == num_pages.dtype == torch.int32
        and page_weights.dtype == torch.float32
        and page_ids.shape == page_weights.shape
        and page_ids.stride(0) == page_weights.stride(0)
        and (page_ids.shape[1] < 2 or page_ids.stride(1) == page_weights.stride(1) == 1)
        and len(page_ids) == len(num_pages)
        and len(slots) == len(starts) == len(lens)
        and num_tiles.numel() == 1
        and num_pages.is_contiguous()
        and all(t.dtype == torch.int32 and t.is_contiguous() for t in tiles)
        and (scale_row is None or _is_dora(scale_row, scale, bias, num_pages, y.shape[1]))
    )


def _is_dense(pages: Tensor) -> bool:
    """Whether a page's own values lie one after the other."""
    stride, dense = pages.stride(), 1
    for size, step in zip(pages.shape[:0:-1], stride[:0:-1], strict=True):
        if step != dense:
            return False
        dense *= size
    return True


def _is_dora(
    scale_row: Tensor, scale: Tensor | None, bias: Tensor | None, num_pages: Tensor, out: int
) -> bool:
    """Whether DoRA's part of a table is one that the C++ form takes."""
    tables = [t for t in (scale, bias) if t is not None]
    return (
        bool(tables)
        and scale_row.dtype == torch.int32
        and scale_row.shape == num_pages.shape
        and tables[0].dtype in native.DTYPE_CODES
        and all(t.shape == tables[0].shape and t.shape[1] == out for t in tables)
        and all(t.dtype == tables[0].dtype for t in tables)
        and all(t.is_contiguous() for t in (scale_row, *tables))
    )


def _cpp_lora(
    y: Tensor,
    x: Tensor | None,
    ids: Tensor | None,
    a_pages: Tensor,
    b_pages: Tensor,
    table: Table,
    tiles: Tiles,
    slice_starts: Sequence[int],
) -> None:
    page_ids, page_weights, num_pages, scale_row, scale, bias = table
    slots, first_rows, lens, num_tiles = tiles
    starts = (c_int64 * len(slice_starts))(*slice_starts)
    tokens, out = y.shape
    dora = scale if scale is not None else bias
    args = native.LoraArgs(
        y=y.data_ptr(),
        x=native.pointer(x),
        ids=native.pointer(ids),
        y_stride=y.stride(0),
        x_stride=0 if x is None else x.stride(0),
        tokens=tokens,
        in_=a_pages.shape[1] if x is None else x.shape[1],
        out=out,
        a=a_pages.data_ptr(),
        b=b_pages.data_ptr(),
        a_stride=a_pages.stride(0),
        b_stride=b_pages.stride(0),
        pages=min(len(a_pages), len(b_pages)),
        slice_starts=addressof(starts),
        slices=len(slice_starts) - 1,
        page_ids=page_ids.data_ptr(),
        page_weights=page_weights.data_ptr(),
        num_pages=num_pages.data_ptr(),
        scale_row=native.pointer(scale_row),
        scale=native.pointer(scale),
        bias=native.pointer(bias),
        slots=len(page_ids),
        max_pages=page_ids.shape[1],
        table_stride=page_ids.stride(0),
        scale_rows=0 if dora is None else len(dora),
        tile_slots=slots.data_ptr(),
        tile_starts=first_rows.data_ptr(),
        tile_lens=lens.data_ptr(),
        num_tiles=num_tiles.data_ptr(),
        tiles=len(slots),
        dtype=native.DTYPE_CODES[y.dtype],
        page_dtype=native.DTYPE_CODES[a_pages.dtype],
        scale_dtype=0 if dora is None else native.DTYPE_CODES[dora.dtype],
        num_threads=torch.get_num_threads(),
    )
    args.starts = starts  # which lives as long
    graph.call("lora", args, y, x, ids, a_pages, b_pages, *table, *tiles)


def _expand(
    y: Tensor,
    b_pages: Tensor,
    table: Table,
    batch: _Batch,
    slice_starts: Sequence[int],
    shrink: Callable[[Tensor, Tensor], Tensor],
) -> None:
    if not len(batch.slots):
        return
    total = y[batch.rows].float()  # [tiles, width, out]
    scale_rows = None if table.scale_row is None else table.scale_row[batch.slots]
    if scale_rows is not None and table.scale is not None:
        scale = table.scale[scale_rows.clamp(min=0).long()].float()
        total = torch.where((scale_rows >= 0)[:, None, None], total * scale[:, None], total)
    for p in range(int(batch.pages.max())):
        chosen = (batch.pages > p).nonzero()[:, 0]
        slots = batch.slots[chosen]
        page_ids = table.page_ids[slots, p].long()
        u = shrink(chosen, page_ids) * table.page_weights[slots, p][:, None, None]
        u = u.to(b_pages.dtype).float()
        u = u.reshape(*u.shape[:2], -1, PAGE_ROWS)
        b = b_pages[page_ids].float()
        everything = len(chosen) == len(total)
        for s, (first, last) in enumerate(itertools.pairwise(slice_starts)):
            # Products narrower than 12 columns were seen to treat rows of a tile differently.
            columns = F.pad(b[:, :, first:last], (0, -(last - first) % ROWS))
            delta = torch.bmm(u[:, :, s], columns)[..., : last - first]
            if everything:
                total[..., first:last] += delta
            else:
                total[chosen, :, first:last] += delta
    if scale_rows is not None and table.bias is not None:
        bias = table.bias[scale_rows.clamp(min=0).long()].float()
        total = torch.where((scale_rows >= 0)[:, None, None], total + bias[:, None], total)
    y[batch.rows[batch.real]] = total[batch.real].to(y.dtype)
