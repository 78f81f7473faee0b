"""LoRA weights in the form in which `lora_` reads them: from PEFT's layout to pages and a table.

A page is 8 rank rows of one adapter. Ranks are rounded up to whole pages and nothing else is
padded, so adapters of any ranks share a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .cpu.huge_pages import empty_huge
from .packed_weight import FLOATS
from .tiles import PAGE_ROWS, Table


class LoraWeights(NamedTuple):
    """The LoRA of one linear, in PEFT's layout: it adds `scaling * x @ a.T @ b.T` to the output."""

    a: Tensor  # [rank, in], PEFT's lora_A.weight
    b: Tensor  # [out, rank], PEFT's lora_B.weight
    scaling: float = 1.0  # PEFT's: lora_alpha / r, with rsLoRA lora_alpha / sqrt(r)


class PackedLora(NamedTuple):
    """What the ops take of some adapters: `lora_(y, x, *packed, tiles, slice_starts)`."""

    a_pages: Tensor  # [pages, slices, 8, in]
    b_pages: Tensor  # [pages, 8, out]
    table: Table


def pages_for(rank: int) -> int:
    """Pages that hold so many rank rows."""
    return -(-rank // PAGE_ROWS)


def pack_lora(
    adapters: Sequence[LoraWeights | Sequence[LoraWeights | None]],
    slice_starts: Sequence[int] | None = None,  # [slices + 1], first output column of each slice
    *,
    mixes: Sequence[Sequence[tuple[int, float]]] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> PackedLora:
    """Copies the adapters of one linear into pages, and makes the table of their slots.

    An adapter of a fused linear (q, k and v, say) is a list of weights, one for each slice, None
    for a slice that it leaves alone; `slice_starts` is then what `lora_` gets. Slot i is adapter i,
    or with `mixes` the weighted sum of the (adapter, weight) pairs of mix i: no copy is made of
    them. The scaling is folded into B in fp32 before the one cast to `dtype`, which is float32,
    bfloat16 or float16, by default that of the first A, as is the device. ValueError for shapes
    that disagree and adapters that are not there.
    """
    by_slice = [[own] if isinstance(own, LoraWeights) else list(own) for own in adapters]
    first, starts = _check_shapes(by_slice, slice_starts)
    in_, dtype, device = first.shape[1], dtype or first.dtype, device or first.device
    if dtype not in FLOATS.values():
        raise ValueError(f"pages are {', '.join(FLOATS)}, not {str(dtype).removeprefix('torch.')}")
    counts = [
        max((pages_for(len(own.a)) for own in slices if own is not None), default=0)
        for slices in by_slice
    ]
    bounds = [0, *accumulate(counts)]
    a_pages = empty_huge((bounds[-1], len(starts) - 1, PAGE_ROWS, in_), dtype, device).zero_()
    b_pages = empty_huge((bounds[-1], PAGE_ROWS, starts[-1]), dtype, device).zero_()
    for slices, (page, end) in zip(by_slice, pairwise(bounds), strict=True):
        for s, own in enumerate(slices):
            if own is not None:
                columns = slice(starts[s], starts[s + 1])
                write_lora_(a_pages[page:end, s], b_pages[page:end, :, columns], own)
    return PackedLora(a_pages, b_pages, _table(bounds, mixes, device))


def write_lora_(
    a_pages: Tensor,  # [pages, 8, in], changed in place
    b_pages: Tensor,  # [pages, 8, out], changed in place
    weights: LoraWeights,
) -> None:
    """Writes the weights of one linear, the scaling inside B, into pages of zeros, any strides.

    For those who keep a pool of pages; rows above the rank are left as they are. ValueError for
    shapes that disagree.
    """
    _check_weights(weights, a_pages.shape[2], b_pages.shape[2])
    a, b = weights.a.detach(), weights.b.detach()  # PEFT's require grad; pages are a copy
    if pages_for(len(a)) > len(a_pages) or len(a_pages) != len(b_pages):
        raise ValueError(
            f"rank {len(a)} does not fit {len(a_pages)} pages of A and {len(b_pages)} of B"
        )
    _write_rows(a_pages, a)
    _write_rows(b_pages, b.T.float() * weights.scaling)


def _write_rows(pages: Tensor, rows: Tensor) -> None:
    full, rest = divmod(len(rows), PAGE_ROWS)
    if full > 1:  # torch copies a transposed matrix faster as a whole than in pages
        rows = rows.contiguous()
    pages[:full] = rows[: full * PAGE_ROWS].view(full, PAGE_ROWS, rows.shape[1])
    if rest:
        pages[full, :rest] = rows[full * PAGE_ROWS :]


def _check_shapes(
    by_slice: Sequence[Sequence[LoraWeights | None]], slice_starts: Sequence[int] | None
) -> tuple[Tensor, tuple[int, ...]]:
    """The first A, and where the slices start."""
    present = [own for slices in by_slice for own in slices if own is not None]
    if not present:
        raise ValueError("there are no weights to pack, so nothing says how wide they are")
    if not all(isinstance(own, LoraWeights) for own in present):
        raise TypeError("an adapter is LoraWeights(a, b, scaling), or a list of them and of None")
    if any(values.dim() != 2 for own in present for values in own[:2]):
        raise ValueError("A and B must be matrices")
    starts = (0, len(present[0].b)) if slice_starts is None else tuple(slice_starts)
    if starts[:1] != (0,) or len(starts) < 2 or any(end < start for start, end in pairwise(starts)):
        raise ValueError(f"slice_starts must begin with 0 and not fall, but are {list(starts)}")
    in_ = present[0].a.shape[1]
    for i, slices in enumerate(by_slice):
        if len(slices) != len(starts) - 1:
            raise ValueError(f"adapter {i} has {len(slices)} slices, not {len(starts) - 1}")
        for own, (start, end) in zip(slices, pairwise(starts), strict=True):
            if own is not None:
                _check_weights(own, in_, end - start, f"adapter {i}: ")
    return present[0].a, starts


def _check_weights(own: LoraWeights, in_: int, out: int, which: str = "") -> None:
    if own.a.shape != (len(own.a), in_) or own.b.shape != (out, len(own.a)):
        raise ValueError(
            f"{which}A must be [rank, in] and B [out, rank], here [rank, {in_}] and "
            f"[{out}, rank], but they are {list(own.a.shape)} and {list(own.b.shape)}"
        )


def _table(
    bounds: Sequence[int],  # first page of each adapter, and where the last one ends
    mixes: Sequence[Sequence[tuple[int, float]]] | None,
    device: torch.device | str,
) -> Table:
    count = len(bounds) - 1
    if mixes is None:
        mixes = [[(adapter, 1.0)] for adapter in range(count)]
    for adapter, _ in (pair for mix in mixes for pair in mix):
        if not 0 <= adapter < count:
            raise ValueError(f"a mix names adapter {adapter}, but there are {count}")
    rows = [
        [(page, weight) for i, weight in mix for page in range(bounds[i], bounds[i + 1])]
        for mix in mixes
    ]
    ids = torch.zeros(len(rows), max(map(len, rows), default=0), dtype=torch.int32)
    weights = torch.zeros(ids.shape, dtype=torch.float32)
    for slot, row in enumerate(rows):
        ids[slot, : len(row)] = torch.tensor([page for page, _ in row], dtype=torch.int32)
        weights[slot, : len(row)] = torch.tensor([weight for _, weight in row])
    counts = torch.tensor([len(row) for row in rows], dtype=torch.int32)
    return Table(ids.to(device), weights.to(device), counts.to(device))
