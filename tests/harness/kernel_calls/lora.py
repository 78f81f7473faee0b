"""Arguments of the LoRA ops, of every kind: what nobody may read is NaN."""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import torch
from torch import Tensor

from multilora_kernels import Columns, Table, Tiles, make_tiles

RANKS = (8, 16, 24, 64, 128, 8, 40, 16)
"""The rank of each slot; a last slot, which no token names, has pages of NaN."""

ZIPF = [1 / (i + 1) ** 1.5 for i in range(len(RANKS))]
POPULARITY = {
    "distinct": list(range(8)),
    "uniform": sorted(random.Random(0).choices(range(8), k=21)),
    "zipf": sorted(random.Random(1).choices(range(8), ZIPF, k=37)),
    "identical": [3] * 21,
    "skewed": [5] * 70 + [0, 1, 2, -1, 3, 3, 7],
    "half base": [-1, 3, -1, 5, 5, -1] * 3,
    "all base": [-1] * 5,
    "empty": [],
}


class LoraCall(NamedTuple):
    """The arguments of `lora_`, in its order."""

    y: Tensor
    x: Tensor
    a_pages: Tensor
    b_pages: Tensor
    table: Table
    tiles: Tiles
    slice_starts: tuple[int, ...]

    def copy(self, **changed: Any) -> LoraCall:
        """The same with a `y` of its own."""
        return self._replace(y=self.y.clone())._replace(**changed)


def nan_pages(count: int, *shape: int, dtype: torch.dtype, aligned: bool = True) -> Tensor:
    """`count` pages of NaN with a gap between them and one before the first.

    Aligned ones begin at multiples of 16 bytes, as a GPU wants them.
    """
    numel = torch.Size(shape).numel()
    first, gap = (16, -numel % 16 + 16) if aligned else (7, 23)
    pages = torch.full((count, numel + gap), torch.nan, dtype=dtype)[:, first : first + numel]
    return pages.unflatten(1, shape)


def make_table(
    out: int, dtype: torch.dtype, ranks: tuple[int, ...] = RANKS, dora: bool = False
) -> tuple[Table, Tensor]:
    """A table of shuffled pages, those that no slot owns left to NaN, and the owned page ids."""
    counts = [rank // 8 for rank in ranks]
    order = (torch.randperm(sum(counts)) + 1).tolist()  # page 0 belongs to nobody
    page_ids = torch.zeros(len(ranks) + 1, max(counts) + 1, dtype=torch.int32)
    weights = torch.full(page_ids.shape, torch.nan)
    for slot, count in enumerate(counts):
        page_ids[slot, :count] = torch.tensor([order.pop() for _ in range(count)])
        weights[slot, :count] = 0.5 + torch.rand(count)
    table = Table(page_ids, weights, torch.tensor([*counts, max(counts)], dtype=torch.int32))
    if dora:
        scale, bias = torch.full((2, 5, out), torch.nan)
        scale[1:4], bias[1:4] = 0.5 + torch.rand(3, out), torch.randn(3, out)
        rows = [1, -1, 2, 3, -1, 1, 2, -1][: len(ranks)]
        row = torch.tensor([*rows, 0], dtype=torch.int32)
        table = table._replace(scale_row=row, scale=scale.to(dtype), bias=bias.to(dtype))
    return table, torch.arange(1, sum(counts) + 1)


def make_lora_call(
    slots: list[int],
    dtype: torch.dtype,
    *,
    in_: int = 160,
    starts: tuple[int, ...] = (0, 64, 96, 128),
    ranks: tuple[int, ...] = RANKS,
    dora: bool = False,
    tile: int = 16,
    size: int | None = None,
    aligned: bool = True,
) -> LoraCall:
    out, slices = starts[-1], len(starts) - 1
    table, owned = make_table(out, dtype, ranks, dora)
    a_pages = nan_pages(len(owned) + 2, slices, 8, in_, dtype=dtype, aligned=aligned)
    b_pages = nan_pages(len(owned) + 2, 8, out, dtype=dtype, aligned=aligned)
    a_pages[owned] = (torch.randn(len(owned), slices, 8, in_) / in_**0.5).to(dtype)
    b_pages[owned] = (torch.randn(len(owned), 8, out) / 8).to(dtype)
    y, x = torch.randn(len(slots), out).to(dtype), torch.randn(len(slots), in_).to(dtype)
    return LoraCall(y, x, a_pages, b_pages, table, make_tiles(slots, tile, size), starts)


class EmbeddingCall(NamedTuple):
    """The arguments of `lora_embed_`, in its order."""

    y: Tensor
    ids: Tensor
    a_pages: Tensor
    b_pages: Tensor
    table: Table
    tiles: Tiles


def make_embedding_call(slots: list[int], dtype: torch.dtype, **options: Any) -> EmbeddingCall:
    """Of a vocabulary of 19 tokens; with the options of `make_lora_call`."""
    call = make_lora_call(slots, dtype, **options)
    aligned = options.get("aligned", True)
    a_pages = nan_pages(len(call.a_pages), 19, 8, dtype=dtype, aligned=aligned)
    a_pages[1:-1] = torch.randn(len(a_pages) - 2, 19, 8).to(dtype)
    ids = torch.randint(19, (len(slots),))
    return EmbeddingCall(call.y, ids, a_pages, call.b_pages, call.table, call.tiles)


class ColumnsCall(NamedTuple):
    """The arguments of `lora_columns_`, in its order."""

    y: Tensor
    x: Tensor
    changes: Columns
    tiles: Tiles


def make_columns_call(
    slots: list[int],
    dtype: torch.dtype = torch.float32,
    *,
    in_: int = 36,
    out: int = 70,
    weights_dtype: torch.dtype | None = None,
    size: int | None = None,
) -> ColumnsCall:
    """Slots with 0 to 40 columns each; a last one, which no token names, says that it has more."""
    counts = [3, 0, 40, 8, 1, 17, 33, 2]
    ids = torch.stack([torch.randperm(out)[:40] for _ in range(9)]).int()
    weights = torch.randn(9, 40, in_).to(weights_dtype or dtype)
    y, x = torch.randn(len(slots), out).to(dtype), torch.randn(len(slots), in_).to(dtype)
    changes = Columns(ids, torch.tensor([*counts, 99], dtype=torch.int32), weights)
    return ColumnsCall(y, x, changes, make_tiles(slots, 16, size))
