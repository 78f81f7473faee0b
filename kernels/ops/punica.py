"""`lora_` by Punica's names and arguments, for weights that lie stacked by adapter and layer.

Where Punica takes pointers these take slots into one tensor, and -1 for no adapter. Each call makes
a table and tiles on the device; who calls for many layers makes them once and calls `lora_`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..tiles import DECODE_TILE, PAGE_ROWS, PREFILL_TILE, Table, capacity, make_tiles
from .arguments import check
from .lora import lora_


def sgmv_(
    y: Tensor,  # [tokens, out], changed in place
    x: Tensor,  # [tokens, in]
    wa: Tensor,  # [slots, layers, rank, in], contiguous; a rank that is a multiple of 8
    wb: Tensor,  # [slots, layers, rank, out], contiguous
    slots: Tensor,  # int [segments], the adapter of each; -1 = none
    s: Tensor,  # int [segments + 1], first token of each segment, and where the last one ends
    layer_idx: int,
    scale: float = 1.0,
) -> None:
    """Segmented-gather products, for prompts: Punica's `add_lora_sgmv_custom_cutlass`.

    `y[t] += scale * x[t] @ wa[slots[i], layer_idx].T @ wb[slots[i], layer_idx]` for the tokens
    s[i] <= t < s[i + 1] of segment i. Tokens of no segment stay. Looks at no value on the host.
    ValueError for shapes that disagree.
    """
    tokens, segments = len(y), len(slots)
    check(len(s) == segments + 1, f"{segments} segments have {segments + 1} bounds, not {len(s)}")
    if not segments:
        return
    token = torch.arange(tokens, device=y.device)
    segment = torch.searchsorted(s, token.to(s.dtype), right=True) - 1  # empty ones are skipped
    inside = (segment >= 0) & (segment < segments)
    token_slots = torch.where(inside, slots[segment.clamp(0, segments - 1)], -1)
    tiles = make_tiles(token_slots, PREFILL_TILE, capacity(tokens, segments, PREFILL_TILE))
    table, a_pages, b_pages = _as_pages(wa, wb, layer_idx, scale)
    lora_(y, x, a_pages, b_pages, table, tiles, (0, y.shape[1]))


def bgmv_(
    y: Tensor,  # [tokens, out], changed in place
    x: Tensor,  # [tokens, in]
    wa: Tensor,  # [slots, layers, rank, in], contiguous; a rank that is a multiple of 8
    wb: Tensor,  # [slots, layers, rank, out], contiguous
    indices: Tensor,  # int [tokens], the adapter of each; -1 = none
    layer_idx: int,
    scale: float = 1.0,
) -> None:
    """Batched-gather products, for single tokens: Punica's `bgmv` for A and then for B.

    `y[i] += scale * x[i] @ wa[indices[i], layer_idx].T @ wb[indices[i], layer_idx]`. Looks at no
    value on the host. ValueError for shapes that disagree.
    """
    check(len(indices) == len(y), f"{len(y)} tokens have {len(indices)} indices")
    table, a_pages, b_pages = _as_pages(wa, wb, layer_idx, scale)
    lora_(y, x, a_pages, b_pages, table, make_tiles(indices, DECODE_TILE), (0, y.shape[1]))


def _as_pages(wa: Tensor, wb: Tensor, layer_idx: int, scale: float) -> tuple[Table, Tensor, Tensor]:
    """The table of one layer, and all of the weights as rank pages: views."""
    check(wa.dim() == wb.dim() == 4, "wa and wb must be [slots, layers, rank, in or out]")
    check(wa.shape[:3] == wb.shape[:3], "wa and wb must have the same slots, layers and rank")
    check(wa.is_contiguous() and wb.is_contiguous(), "wa and wb must be contiguous")
    num_slots, layers, rank, _ = wa.shape
    check(
        rank % PAGE_ROWS == 0,
        f"rank {rank} is no multiple of {PAGE_ROWS}: pad it with rows of zeros",
    )
    check(0 <= layer_idx < layers, f"layer_idx {layer_idx} is not within 0..{layers - 1}")
    each, device = rank // PAGE_ROWS, wa.device
    first = (torch.arange(num_slots, device=device) * layers + layer_idx) * each
    page_ids = (first[:, None] + torch.arange(each, device=device)).to(torch.int32)
    table = Table(
        page_ids,
        torch.full(page_ids.shape, scale, dtype=torch.float32, device=device),
        torch.full((num_slots,), each, dtype=torch.int32, device=device),
    )
    a_pages, b_pages = (w.view(-1, PAGE_ROWS, w.shape[3]) for w in (wa, wb))
    return table, a_pages.unsqueeze(1), b_pages
