"""The LoRA ops on CPU, in vectorised torch and in C++: see `cpu` for what keeps rows apart."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import native, reference
from .cpu import CPP_DTYPES, ROWS, padded, threads_for
from .tiles import PREFILL_TILE, Table, Tiles


def lora_shrink(x: Tensor, a_pages: Tensor, table: Table, tiles: Tiles, split_k: int) -> Tensor:
    """See `reference.lora_shrink`; the stages apart are for tests and benches."""
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
    reference.lora_expand_(y, planes, b_pages, table, tiles, slice_starts)


class _Batch:
    """The tiles of a call as padded row blocks: tile i is rows[i], 16 or a multiple of it."""

    def __init__(self, tiles: Tiles, table: Table) -> None:
        count = int(tiles.num_tiles)
        lens = tiles.lens[:count].long()
        width = padded(int(lens.max())) if count else ROWS
        lane = torch.arange(width)
        self.real = lane < lens[:, None]  # [tiles, width]
        # Padding repeats row 0 and is dropped at the end.
        self.rows = torch.where(self.real, tiles.starts[:count].long()[:, None] + lane, 0)
        self.slots = tiles.slots[:count].long()
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
    if _cpp_lora(y, x, a_pages, b_pages, table, tiles, slice_starts):
        return
    batch = _Batch(tiles, table)

    def shrink(chosen: Tensor, page_ids: Tensor) -> Tensor:
        a = a_pages[page_ids].flatten(1, 2).float()  # [tiles, slices * 8, in]
        return torch.bmm(x[batch.rows[chosen]].float(), a.transpose(1, 2))

    _expand(y, b_pages, table, batch, slice_starts, shrink)


def _cpp_lora(
    y: Tensor,
    x: Tensor,
    a_pages: Tensor,
    b_pages: Tensor,
    table: Table,
    tiles: Tiles,
    slice_starts: Sequence[int],
) -> bool:
    """Does it in C++ if the library can; whether it did."""
    count = int(tiles.num_tiles)
    types = y.dtype == x.dtype and {y.dtype, a_pages.dtype} <= set(CPP_DTYPES)
    dense = (
        y.stride(1) == x.stride(1) == 1
        and a_pages[0].is_contiguous()
        and b_pages[0].is_contiguous()
    )
    if native.LIB is None or not types or not dense or table.scale_row is not None:
        return False
    if count == 0:
        return True
    if (
        int(tiles.lens[:count].max()) > PREFILL_TILE
        or table.page_ids.stride() != table.page_weights.stride()
    ):
        return False
    max_pages = int(table.num_pages[tiles.slots[:count].long()].max())
    slices = len(slice_starts) - 1
    planes = torch.empty(len(x) * max_pages * slices * reference.PAGE)
    starts = torch.tensor(slice_starts)
    work = len(x) * max_pages * reference.PAGE * (slices * x.shape[1] + y.shape[1])
    native.LIB.lora(
        y.data_ptr(), y.stride(0), x.data_ptr(), x.stride(0), native.DTYPE_CODES[y.dtype],
        a_pages.data_ptr(), a_pages.stride(0), b_pages.data_ptr(), b_pages.stride(0),
        native.DTYPE_CODES[a_pages.dtype],
        table.page_ids.data_ptr(), table.page_weights.data_ptr(), table.num_pages.data_ptr(),
        table.page_ids.stride(0),
        tiles.slots.data_ptr(), tiles.starts.data_ptr(), tiles.lens.data_ptr(), count,
        planes.data_ptr(), max_pages,
        starts.data_ptr(), slices, x.shape[1], y.shape[1], threads_for(work),
    )  # fmt: skip
    return True


def lora_embed_(
    y: Tensor, ids: Tensor, a_pages: Tensor, b_pages: Tensor, table: Table, tiles: Tiles
) -> None:
    """See `reference.lora_embed_`."""
    batch = _Batch(tiles, table)

    def shrink(chosen: Tensor, page_ids: Tensor) -> Tensor:
        return a_pages[page_ids[:, None], ids[batch.rows[chosen]]].float()

    _expand(y, b_pages, table, batch, (0, y.shape[1]), shrink)


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
        u = u.reshape(*u.shape[:2], -1, reference.PAGE)
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
