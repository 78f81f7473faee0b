"""From a token-to-slot map to the list of tiles that the LoRA ops work on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

PAGE_ROWS = 8
"""Rank rows in a page."""

DECODE_TILE, PREFILL_TILE = 16, 64
"""Most tokens in a tile, for steps of single tokens and for steps that hold a prompt."""


class Table(NamedTuple):
    """What each slot adds at one site: its rank pages and their weights, in order.

    `scale_row`, `scale` and `bias` are DoRA's: `y = scale[row] * y + delta + bias[row]`, and a row
    of -1 is none.
    """

    page_ids: Tensor  # int32 [slots, max_pages]
    page_weights: Tensor  # fp32 [slots, max_pages]
    num_pages: Tensor  # int32 [slots]
    scale_row: Tensor | None = None  # int32 [slots]
    scale: Tensor | None = None  # [rows, out]
    bias: Tensor | None = None  # [rows, out]


class Columns(NamedTuple):
    """What each slot adds to the weight of a linear, in some output columns alone.

    A slot's column ids differ from each other. Weights beyond its own columns are read, and what
    comes of them is dropped.
    """

    column_ids: Tensor  # int32 [slots, max_columns]
    num_columns: Tensor  # int32 [slots]
    weights: Tensor  # [slots, max_columns, in]; max_columns a multiple of 8


class Tiles(NamedTuple):
    """Runs of consecutive tokens with one slot; `num_tiles` of the capacity are real.

    Those are in the order of their tokens and share none.
    """

    slots: Tensor  # int32 [capacity], -1 beyond the real ones
    starts: Tensor  # int32 [capacity], first token
    lens: Tensor  # int32 [capacity], tokens
    num_tiles: Tensor  # int32 [1]


def capacity(tokens: int, segments: int, tile: int) -> int:
    """Tiles that always suffice for `tokens` tokens in at most `segments` runs of one slot."""
    return min(tokens, -(-tokens // tile) + segments)


def make_tiles(token_slots: Sequence[int] | Tensor, tile: int, size: int | None = None) -> Tiles:
    """Cuts every run of one slot >= 0 into tiles of at most `tile` tokens; base tokens get none.

    A list gives tiles on the host. An integer tensor [tokens] gives them on its device, by torch
    operators alone that never look at a value on the host: a CUDA graph may capture it. `size` is
    the capacity to pad to; None = just enough for a list, one for each token of a tensor.

    Tiles that do not fit are a ValueError for a list. Of a tensor only the device knows their
    number: there an assertion on the device fails, a RuntimeError at once on a CPU. `capacity`
    gives a size that always suffices.
    """
    if tile < 1:
        raise ValueError(f"a tile must hold at least one token, not {tile}")
    if isinstance(token_slots, Tensor):
        return _tiles_on_device(token_slots, tile, len(token_slots) if size is None else size)
    slots = np.asarray(token_slots, dtype=np.int32)
    is_edge = np.ones(len(slots) + 1, dtype=np.bool_)  # a run begins here, or the last one ends
    is_edge[1:-1] = slots[1:] != slots[:-1]
    edges = is_edge.nonzero()[0]
    begins, ends = edges[:-1], edges[1:]
    has_slot = slots[begins] >= 0
    begins, ends = begins[has_slot], ends[has_slot]
    counts = (ends - begins + tile - 1) // tile
    before = counts.cumsum() - counts
    count = int(counts.sum())
    if size is None:
        size = count
    if count > size:
        raise ValueError(f"{count} tiles do not fit a capacity of {size}; use a larger bucket")
    columns = np.zeros((3, size), dtype=np.int32)
    columns[0, count:] = -1
    starts = np.arange(0, tile * count, tile) + (begins - tile * before).repeat(counts)
    columns[0, :count] = slots[starts]
    columns[1, :count] = starts
    columns[2, :count] = np.minimum(ends.repeat(counts) - starts, tile)
    tiles = torch.from_numpy(columns).unbind()
    return Tiles(tiles[0], tiles[1], tiles[2], torch.tensor([count], dtype=torch.int32))


def _tiles_on_device(token_slots: Tensor, tile: int, size: int) -> Tiles:
    """`make_tiles` of a tensor. Shapes depend on the number of tokens and on `size` alone."""
    tokens, device = len(token_slots), token_slots.device
    place = torch.arange(tokens, device=device)
    if not tokens:
        none = torch.zeros(size, dtype=torch.int32, device=device)
        return Tiles(none - 1, none, none.clone(), none.new_zeros(1))
    begins_run = torch.ones(tokens, dtype=torch.bool, device=device)
    begins_run[1:] = token_slots[1:] != token_slots[:-1]
    run_start = torch.where(begins_run, place, 0).cummax(0).values
    has_slot = token_slots >= 0
    begins_tile = (place - run_start) % tile == 0  # a run that begins does so at 0
    ends_tile = torch.ones_like(begins_run)
    ends_tile[:-1] = begins_tile[1:]
    # How many tiles have begun, and ended, up to each token: the n-th does so where n is reached.
    begun = (begins_tile & has_slot).cumsum(0)
    ended = (ends_tile & has_slot).cumsum(0)
    count = begun[-1:]
    torch._assert_async(count <= size, "make_tiles: more tiles than its size; use a larger one")
    ordinal = torch.arange(1, size + 1, device=device)
    first, last = torch.searchsorted(begun, ordinal), torch.searchsorted(ended, ordinal)
    real = ordinal <= count
    slots = torch.where(real, token_slots[first.clamp(max=tokens - 1)], -1)
    starts, lens = torch.where(real, first, 0), torch.where(real, last + 1 - first, 0)
    slots, starts, lens, count = (t.to(torch.int32) for t in (slots, starts, lens, count))
    return Tiles(slots, starts, lens, count)
