"""From a token-to-slot map to the list of tiles that the LoRA ops work on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

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


def make_tiles(token_slots: Sequence[int], tile: int, size: int | None = None) -> Tiles:
    """Cuts every run of one slot >= 0 into tiles of at most `tile` tokens; base tokens get none.

    `size` is the capacity to pad to; None = just enough. ValueError if the tiles do not fit.
    """
    rows: list[tuple[int, int, int]] = []
    start = 0
    for end in range(1, len(token_slots) + 1):
        if end < len(token_slots) and token_slots[end] == token_slots[start]:
            continue
        if token_slots[start] >= 0:
            for first in range(start, end, tile):
                rows.append((token_slots[start], first, min(tile, end - first)))
        start = end
    if size is None:
        size = len(rows)
    if len(rows) > size:
        raise ValueError(f"{len(rows)} tiles do not fit a capacity of {size}; use a larger bucket")
    rows_t = torch.tensor(rows + [(-1, 0, 0)] * (size - len(rows)), dtype=torch.int32).reshape(
        -1, 3
    )
    slots, starts, lens = (column.contiguous() for column in rows_t.unbind(1))
    return Tiles(slots, starts, lens, torch.tensor([len(rows)], dtype=torch.int32))
