"""Low-rank deltas, of many adapters in one batch: SGMV for prompts, BGMV for single tokens."""

from __future__ import annotations

from collections.abc import Sequence
from operator import le

import torch
from torch import Tensor

from ..cpu import lora as cpu
from ..cuda import dispatch as cuda
from ..library import register
from ..tiles import Columns, Table, Tiles
from .arguments import check, refuse_gradients


def lora_shrink(
    x: Tensor,  # [tokens, in]
    a_pages: Tensor,  # [pages, slices, 8, in]
    table: Table,
    tiles: Tiles,
    split_k: int = 1,  # parts of `in`, a plane for each
) -> Tensor:  # fp32 [split_k, tokens, slices * max_pages * 8]
    """The first stage of `lora_`, into rank space: the products of A.

    Entries beyond a row's own pages are 0 on a CPU and undefined on a GPU. ValueError for shapes
    that disagree and a `split_k` that is not within 1..in; on CPU IndexError like `lora_`.
    """
    refuse_gradients(x, a_pages, table.page_weights, table.scale, table.bias)
    check(
        x.dim() == 2 and a_pages.dim() == 4,
        "x must be [tokens, in], a_pages [pages, slices, 8, in]",
    )
    check(x.shape[1] == a_pages.shape[3], f"x has {x.shape[1]} columns, a_pages {a_pages.shape[3]}")
    check(1 <= split_k <= max(x.shape[1], 1), f"split_k {split_k} is not within 1..{x.shape[1]}")
    planes: Tensor = _SHRINK(x, a_pages, *table, *tiles, split_k)
    return planes


def lora_splits(x: Tensor, a_pages: Tensor) -> int:
    """The `split_k` with which `lora_` computes: with it, the two stages give the same bits.

    x [tokens, in]; a_pages [pages, slices, 8, in]. On a CPU 1.
    """
    found: int = _SPLITS(x, a_pages)
    return found


def lora_expand_(
    y: Tensor,  # [tokens, out], changed in place
    planes: Tensor,  # fp32 [split_k, tokens, slices * max_pages * 8]
    b_pages: Tensor,  # [pages, 8, out]
    table: Table,
    tiles: Tiles,
    slice_starts: Sequence[int],  # [slices + 1]
) -> None:
    """The second stage of `lora_`: sums the planes in order, adds B times them, rounds once.

    ValueError for shapes that disagree; on CPU IndexError like `lora_`.
    """
    refuse_gradients(y, planes, b_pages, table.page_weights, table.scale, table.bias)
    _check_out(y, b_pages, slice_starts)
    _EXPAND(y, planes, b_pages, *table, *tiles, list(slice_starts))


def lora_(
    y: Tensor,  # [tokens, out], changed in place
    x: Tensor,  # [tokens, in]
    a_pages: Tensor,  # [pages, slices, 8, in]
    b_pages: Tensor,  # [pages, 8, out]
    table: Table,
    tiles: Tiles,
    slice_starts: Sequence[int],  # [slices + 1], first output column of each slice, then `out`
) -> None:
    """Adds to each row of `y` the low-rank delta of that row's slot; base rows stay untouched.

    `y[t] = round(c * y[t] + sum_p B[p]^T (w_p * A[p] x[t]) + bias)` over the pages p of t's slot,
    in table order, in fp32. Pages may have any stride(0). Raises ValueError for shapes that
    disagree; on CPU IndexError, with y as it was, for a table or tiles with a number out of range
    and for tiles that overlap or go back.
    """
    refuse_gradients(y, x, a_pages, b_pages, table.page_weights, table.scale, table.bias)
    _check_out(y, b_pages, slice_starts)
    check(x.dim() == 2 and len(x) == len(y), "x and y must have as many rows")
    check(a_pages.dim() == 4 and a_pages.shape[2] == 8, "a_pages must be [pages, slices, 8, in]")
    check(x.shape[1] == a_pages.shape[3], f"x has {x.shape[1]} columns, a_pages {a_pages.shape[3]}")
    check(
        a_pages.shape[1] == len(slice_starts) - 1, "a_pages and slice_starts disagree on the slices"
    )
    _LORA(y, x, a_pages, b_pages, *table, *tiles, list(slice_starts))


def lora_embed_(
    y: Tensor,  # [tokens, hidden], changed in place
    ids: Tensor,  # int64 [tokens]
    a_pages: Tensor,  # [pages, vocab, 8]
    b_pages: Tensor,  # [pages, 8, hidden]
    table: Table,
    tiles: Tiles,
) -> None:
    """`lora_` for an embedding: a token's row of A's pages stands for `A @ one_hot`.

    Of `ids` those are looked at that stand in a tile. ValueError for shapes that disagree; on CPU
    IndexError like `lora_`, and for an id out of the vocabulary.
    """
    refuse_gradients(y, a_pages, b_pages, table.page_weights, table.scale, table.bias)
    _check_out(y, b_pages, (0, y.shape[1]))
    check(a_pages.dim() == 3 and a_pages.shape[2] == 8, "a_pages must be [pages, vocab, 8]")
    check(ids.shape == y.shape[:1], "ids and y must have as many rows")
    _EMBED(y, ids, a_pages, b_pages, *table, *tiles)


def lora_head_(
    y: Tensor,  # [rows, vocab], logits, changed in place
    x: Tensor,  # [rows, hidden]
    a_pages: Tensor,  # [pages, 1, 8, hidden]
    b_pages: Tensor,  # [pages, 8, vocab]
    table: Table,
    tiles: Tiles,
) -> None:
    """`lora_` on logits, with tiles over their rows; errors as there."""
    lora_(y, x, a_pages, b_pages, table, tiles, (0, y.shape[1]))


def lora_columns_(
    y: Tensor,  # [tokens, out], changed in place
    x: Tensor,  # [tokens, in]
    changes: Columns,
    tiles: Tiles,
) -> None:
    """Adds to each row of `y` what its slot changes in single columns of the weight.

    `y[t, column_ids[c]] = round(y[t, column_ids[c]] + weights[c] @ x[t])` over the columns c of t's
    slot: the trained rows of an adapter's lm_head. Base rows stay untouched. Raises ValueError for
    shapes that disagree; on CPU IndexError, with y as it was, for a number out of range and for
    tiles that overlap or go back.
    """
    refuse_gradients(y, x, changes.weights)
    ids, counts, weights = changes
    check(y.dim() == x.dim() == 2 and len(x) == len(y), "x and y must have as many rows")
    check(
        weights.dim() == 3 and weights.shape[1] % 8 == 0,
        "weights must be [slots, columns, in], with a multiple of 8 columns",
    )
    check(x.shape[1] == weights.shape[2], f"x has {x.shape[1]} columns, weights {weights.shape[2]}")
    check(ids.shape == weights.shape[:2], "column_ids must be [slots, columns] like weights")
    check(counts.shape == weights.shape[:1], "num_columns must be [slots] like weights")
    _COLUMNS(y, x, *changes, *tiles)


def _check_out(y: Tensor, b_pages: Tensor, slice_starts: Sequence[int]) -> None:
    check(y.dim() == 2 and b_pages.dim() == 3, "y must be [tokens, out], b_pages [pages, 8, out]")
    check(y.shape[1] == b_pages.shape[2], f"y has {y.shape[1]} columns, b_pages {b_pages.shape[2]}")
    check(b_pages.shape[1] == 8, "b_pages must be [pages, 8, out]")
    check(
        slice_starts[0] == 0 and slice_starts[-1] == y.shape[1],
        "slice_starts must span y's columns",
    )
    check(all(map(le, slice_starts, slice_starts[1:])), "slice_starts must not fall")


def _shrunk(x: Tensor, a_pages: Tensor, table: Table, tiles: Tiles, split_k: int) -> Tensor:
    columns = a_pages.shape[1] * table.page_ids.shape[1] * 8
    return x.new_empty((split_k, len(x), columns), dtype=torch.float32)


def _one_split(x: Tensor, a_pages: Tensor) -> int:
    return 1


_SHRINK = register(
    "lora_shrink(Tensor x, Tensor a_pages, Table table, Tiles tiles, int split_k) -> Tensor",
    Table,
    Tiles,
    cpu=cpu.lora_shrink,
    cuda=cuda.lora_shrink,
    meta=_shrunk,
)
_SPLITS = register(
    "lora_splits(Tensor x, Tensor a_pages) -> int",
    cpu=_one_split,
    cuda=cuda.lora_splits,
    meta=_one_split,
)
_EXPAND = register(
    "lora_expand_(Tensor(a!) y, Tensor planes, Tensor b_pages, Table table, Tiles tiles, "
    "int[] slice_starts) -> ()",
    Table,
    Tiles,
    cpu=cpu.lora_expand_,
    cuda=cuda.lora_expand_,
)
_LORA = register(
    "lora_(Tensor(a!) y, Tensor x, Tensor a_pages, Tensor b_pages, Table table, Tiles tiles, "
    "int[] slice_starts) -> ()",
    Table,
    Tiles,
    cpu=cpu.lora_,
    cuda=cuda.lora_,
)
_EMBED = register(
    "lora_embed_(Tensor(a!) y, Tensor ids, Tensor a_pages, Tensor b_pages, Table table, "
    "Tiles tiles) -> ()",
    Table,
    Tiles,
    cpu=cpu.lora_embed_,
    cuda=cuda.lora_embed_,
)
_COLUMNS = register(
    "lora_columns_(Tensor(a!) y, Tensor x, Columns changes, Tiles tiles) -> ()",
    Columns,
    Tiles,
    cpu=cpu.lora_columns_,
    cuda=cuda.lora_columns_,
)
