"""What the numbers inside of index tensors may name: csrc/checks.h in Python, for the torch forms.

An index out of range raises IndexError before anything is read or written.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .tiles import Columns, Table, Tiles

# Texts of the codes that the C++ functions return, MULTILORA_BAD_... of csrc/abi.h.
TILES, PAGES, IDS, QUERIES, LENGTHS, BLOCKS, POSITIONS, SLOTS = range(1, 9)
MISTAKES = {
    TILES: "tiles: their number, a slot or a row is out of range, or they overlap or go back",
    PAGES: "table: a number of pages or columns, a page id or a row of changes is out of range",
    IDS: "ids: a token id is out of the vocabulary",
    QUERIES: "query_starts: they fall, or a row is out of range",
    LENGTHS: "seq_lens: shorter than the queries, or longer than the block table",
    BLOCKS: "block_table: a block id is out of range",
    POSITIONS: "positions: one is not in the tables of cos and sin",
    SLOTS: "kv_slots: one is outside of the cache",
}


def refuse(code: int) -> None:
    """Raises IndexError for any code but 0."""
    if code:
        raise IndexError(MISTAKES[code])


def check_tiles(tiles: Tiles, rows: int, num_slots: int) -> Tensor:
    """Of tiles for `rows` rows of y; the slots of the real ones, int64."""
    count = int(tiles.num_tiles)
    if not 0 <= count <= len(tiles.slots):
        refuse(TILES)
    slots, starts, lens = (t[:count].long() for t in tiles[:3])
    if not (_within(slots, 0, num_slots) and _within(starts, 0, rows + 1)):
        refuse(TILES)
    if not (_within(lens, 0, rows + 1) and _within(starts + lens, 0, rows + 1)):
        refuse(TILES)
    if bool((starts[1:] < (starts + lens)[:-1]).any()):
        refuse(TILES)
    return slots


def check_lora(table: Table, tiles: Tiles, rows: int, pages: int) -> None:
    """Of a table and tiles for `rows` rows of y and a pool of `pages` pages."""
    slots = check_tiles(tiles, rows, len(table.num_pages))
    max_pages = table.page_ids.shape[1]
    num_pages = table.num_pages[slots]
    if not _within(num_pages, 0, max_pages + 1):
        refuse(PAGES)
    real = torch.arange(max_pages) < num_pages[:, None]
    if not _within(table.page_ids[slots][real], 0, pages):
        refuse(PAGES)
    if table.scale_row is not None:
        scale_rows = len(_either(table.scale, table.bias))
        if not _within(table.scale_row[slots], -1, scale_rows):
            refuse(PAGES)


def check_ids(ids: Tensor, tiles: Tiles, vocab: int) -> None:
    """Of the token ids that some tile covers; the tiles are checked."""
    for start, rows in list(zip(tiles.starts, tiles.lens, strict=True))[: int(tiles.num_tiles)]:
        if not _within(ids[int(start) : int(start) + int(rows)], 0, vocab):
            refuse(IDS)


def check_attention(
    q: Tensor, k_blocks: Tensor, block_table: Tensor, seq_lens: Tensor, query_starts: Tensor
) -> None:
    """Of the arguments of `paged_attention`."""
    size, counts = k_blocks.shape[1], query_starts.diff()
    if not (_within(query_starts, 0, len(q) + 1) and _within(counts, 0, len(q) + 1)):
        refuse(QUERIES)
    if bool((seq_lens < counts).any()):
        refuse(LENGTHS)
    if not _within(seq_lens, 0, block_table.shape[1] * size + 1):
        refuse(LENGTHS)
    read = torch.arange(block_table.shape[1]) * size < (seq_lens * (counts > 0))[:, None]
    if not _within(block_table[read], 0, len(k_blocks)):
        refuse(BLOCKS)


def check_rope(positions: Tensor, kv_slots: Tensor, cos: Tensor, k_blocks: Tensor) -> None:
    """Of the arguments of `rope_store_kv_`."""
    if not _within(positions, 0, len(cos)):
        refuse(POSITIONS)
    if not _within(kv_slots, -1, k_blocks.shape[0] * k_blocks.shape[1]):
        refuse(SLOTS)


def check_changes(change: Tensor, change_row: Tensor) -> None:
    """Of a norm's rows of trained weights."""
    if not _within(change_row, -1, len(change)):
        refuse(PAGES)


def check_columns(changes: Columns, tiles: Tiles, rows: int, out: int) -> None:
    """Of the arguments of `lora_columns_`, for `rows` rows of y with `out` columns."""
    slots = check_tiles(tiles, rows, len(changes.num_columns))
    counts, most = changes.num_columns[slots], changes.column_ids.shape[1]
    if not _within(counts, 0, most + 1):
        refuse(PAGES)
    real = torch.arange(most) < counts[:, None]
    if not _within(changes.column_ids[slots][real], 0, out):
        refuse(IDS)


def check_targets(targets: Tensor, vocab: int) -> None:
    """Of the targets of `top_logprobs`."""
    if not _within(targets, 0, vocab):
        refuse(IDS)


def _within(values: Tensor, least: int, end: int) -> bool:
    """Whether least <= every value < end."""
    if not values.numel():
        return True
    low, high = values.aminmax()
    return bool(low >= least) and bool(high < end)


def _either(scale: Tensor | None, bias: Tensor | None) -> Tensor:
    found = scale if scale is not None else bias
    assert found is not None, "scale_row without scale or bias"
    return found
