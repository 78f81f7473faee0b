"""Index tensors full of lies: the reference's result or IndexError with nothing changed.

What an op may be asked is written down here once more, number by number in plain Python.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import pytest
import torch

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

import multilora_kernels as mk
from multilora_kernels import Columns, Table, Tiles, index_checks, make_tiles, reference
from multilora_kernels.cpu import native

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

TOKENS, SLOTS, PAGES, MAX_PAGES, VOCAB, DORA_ROWS = 12, 3, 4, 2, 9, 2
STARTS = (0, 5, 18)
BLOCKS, BLOCK_SIZE, MAX_BLOCKS, HEADS, DIM = 5, 4, 3, 2, 6
POSITIONS = 7

forms = pytest.mark.parametrize("form", ["C++", "torch"])
many = settings(max_examples=150)
LIES = [-(2**31), -(2**31) + 1, -2, -1, 0, 1, 2, 3, 4, 5, 12, 13, 20, 100, 2**30, 2**31 - 1]
WIDE_LIES = [*LIES, -(2**63), 2**31, 2**32, 2**32 + 1, 2**62, 2**63 - 1]


@st.composite
def spoiled(draw: st.DrawFn, honest: Sequence[int], lies: Sequence[int] = LIES) -> list[int]:
    """The numbers with a lie in the place of at most two of them."""
    values = list(honest)
    if values and draw(st.booleans()):
        for _ in range(draw(st.integers(1, 2))):
            values[draw(st.integers(0, len(values) - 1))] = draw(st.sampled_from(lies))
    return values


def ints(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def run(form: str, call: Callable[[], Any], mistakes: set[int], changed: Sequence[Tensor]) -> Any:
    """What `call` returns, or None where it must refuse, for one of `mistakes`."""
    if form == "C++" and native.LIB is None:
        pytest.skip("the C++ library is not built")
    before = [tensor.clone() for tensor in changed]
    with patch.object(native, "LIB", native.LIB if form == "C++" else None):
        if not mistakes:
            return call()
        with pytest.raises(IndexError) as caught:
            call()
    assert str(caught.value) in {index_checks.MISTAKES[mistake] for mistake in mistakes}
    for tensor, old in zip(changed, before, strict=True):
        assert torch.equal(tensor, old)
    return None


# LoRA ---------------------------------------------------------------------------------------------


@st.composite
def tables_and_tiles(draw: st.DrawFn) -> tuple[Table, Tiles]:
    slots = draw(st.lists(st.integers(-1, SLOTS - 1), max_size=TOKENS))
    honest = make_tiles(slots, draw(st.integers(1, 5)), None)
    room = draw(st.integers(0, 2))
    # One tile in the place of another: they overlap or go back.
    order = draw(spoiled(range(len(honest.slots)), range(max(len(honest.slots), 1))))
    columns = [column[order].tolist() for column in honest[:3]]
    columns = [draw(spoiled(column)) + [-1] * room for column in columns]
    tiles = Tiles(*map(ints, columns), ints(draw(spoiled([len(order)]))))
    page = st.integers(0, PAGES - 1)
    page_ids = draw(st.lists(page, min_size=SLOTS * MAX_PAGES, max_size=SLOTS * MAX_PAGES))
    counts = draw(st.lists(st.integers(0, MAX_PAGES), min_size=SLOTS, max_size=SLOTS))
    table = Table(
        ints(draw(spoiled(page_ids))).view(SLOTS, MAX_PAGES),
        torch.rand(SLOTS, MAX_PAGES) + 0.5,
        ints(draw(spoiled(counts))),
    )
    if draw(st.booleans()):
        rows = draw(st.lists(st.integers(-1, DORA_ROWS - 1), min_size=SLOTS, max_size=SLOTS))
        scale, bias = torch.rand(2, DORA_ROWS, STARTS[-1])
        table = table._replace(scale_row=ints(draw(spoiled(rows))), scale=scale, bias=bias)
    return table, tiles


def lora_mistakes(table: Table, tiles: Tiles, ids: Sequence[int] | None = None) -> set[int]:
    slots, starts, lens, (count,) = (column.tolist() for column in tiles)
    if not 0 <= count <= len(slots):
        return {index_checks.TILES}
    found, end = set(), 0
    for slot, start, rows in list(zip(slots, starts, lens, strict=True))[:count]:
        if rows < 0 or not end <= start <= start + rows <= TOKENS or not 0 <= slot < SLOTS:
            found.add(index_checks.TILES)
            continue
        end = start + rows
        pages = int(table.num_pages[slot])
        own = table.page_ids[slot, : max(pages, 0)].tolist()
        if not 0 <= pages <= MAX_PAGES or not all(0 <= page < PAGES for page in own):
            found.add(index_checks.PAGES)
        if table.scale_row is not None and not -1 <= int(table.scale_row[slot]) < DORA_ROWS:
            found.add(index_checks.PAGES)
        if ids is not None and any(not 0 <= i < VOCAB for i in ids[start:end]):
            found.add(index_checks.IDS)
    return found


@forms
@many
@given(tables_and_tiles())
def test_lora(form: str, given: tuple[Table, Tiles]) -> None:
    torch.manual_seed(0)
    y, x = torch.randn(TOKENS, STARTS[-1]), torch.randn(TOKENS, 10)
    pages = torch.randn(PAGES, 2, 8, 10), torch.randn(PAGES, 8, STARTS[-1])
    expected, mistakes = y.clone(), lora_mistakes(*given)
    run(form, lambda: mk.lora_(y, x, *pages, *given, STARTS), mistakes, [y])
    if not mistakes:
        reference.lora_(expected, x, *pages, *given, STARTS)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-4)


@many
@given(tables_and_tiles())
def test_the_stages_of_lora(given: tuple[Table, Tiles]) -> None:
    y, x, planes = torch.zeros(TOKENS, 18), torch.ones(TOKENS, 10), torch.ones(1, TOKENS, 32)
    a_pages, b_pages = torch.ones(PAGES, 2, 8, 10), torch.ones(PAGES, 8, 18)
    mistakes = lora_mistakes(*given)
    run("torch", lambda: mk.lora_shrink(x, a_pages, *given), mistakes, [])
    run("torch", lambda: mk.lora_expand_(y, planes, b_pages, *given, STARTS), mistakes, [y])


@forms
@many
@given(tables_and_tiles(), st.data())
def test_lora_embed(form: str, given: tuple[Table, Tiles], data: st.DataObject) -> None:
    torch.manual_seed(0)
    honest = data.draw(st.lists(st.integers(0, VOCAB - 1), min_size=TOKENS, max_size=TOKENS))
    ids = data.draw(spoiled(honest, WIDE_LIES))
    y, ids_t = torch.randn(TOKENS, 18), torch.tensor(ids)
    pages = torch.randn(PAGES, VOCAB, 8), torch.randn(PAGES, 8, 18)
    expected, mistakes = y.clone(), lora_mistakes(*given, ids)
    run(form, lambda: mk.lora_embed_(y, ids_t, *pages, *given), mistakes, [y])
    if not mistakes:
        reference.lora_embed_(expected, ids_t, *pages, *given)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-4)


@forms
@many
@given(tables_and_tiles(), st.data())
def test_lora_columns(form: str, given: tuple[Table, Tiles], data: st.DataObject) -> None:
    torch.manual_seed(0)
    tiles, most, out = given[1], 8, 18
    honest = data.draw(st.lists(st.integers(0, most), min_size=SLOTS, max_size=SLOTS))
    counts = data.draw(spoiled(honest))
    order = st.permutations(range(out)).map(lambda ids: ids[:most])
    ids = data.draw(spoiled([i for _ in range(SLOTS) for i in data.draw(order)]))
    changes = Columns(ints(ids).view(SLOTS, most), ints(counts), torch.randn(SLOTS, most, 10))
    mistakes = lora_mistakes(given[0]._replace(num_pages=ints([0] * SLOTS), scale_row=None), tiles)
    if not mistakes:
        slots = tiles.slots[: int(tiles.num_tiles)].tolist()
        if any(not 0 <= counts[slot] <= most for slot in slots):
            mistakes.add(index_checks.PAGES)
        own = [ids[slot * most :][: min(max(counts[slot], 0), most)] for slot in slots]
        if any(not 0 <= i < out for some in own for i in some):
            mistakes.add(index_checks.IDS)
        if not mistakes and any(len(set(some)) < len(some) for some in own):
            return  # two columns of one id: not for the op to find
    y, x = torch.randn(TOKENS, out), torch.randn(TOKENS, 10)
    expected = y.clone()
    run(form, lambda: mk.lora_columns_(y, x, changes, tiles), mistakes, [y])
    if not mistakes:
        reference.lora_columns_(expected, x, changes, tiles)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-4)


@forms
@many
@given(st.data())
def test_rows_of_trained_norms(form: str, data: st.DataObject) -> None:
    rows = data.draw(st.lists(st.integers(-1, 2), min_size=TOKENS, max_size=TOKENS))
    rows = data.draw(spoiled(rows))
    x, residual, change = torch.ones(TOKENS, 6), torch.ones(TOKENS, 6), torch.ones(3, 6)
    mistakes = set() if all(-1 <= row < 3 for row in rows) else {index_checks.PAGES}
    call = lambda: mk.rms_norm(x, x[0], 1e-5, residual, change, ints(rows))  # noqa: E731
    run(form, call, mistakes, [residual])


# Attention ----------------------------------------------------------------------------------------


@st.composite
def sequences(draw: st.DrawFn) -> tuple[list[list[int]], list[int], list[int]]:
    """A block table, lengths and query starts, of up to three sequences."""
    counts = draw(st.lists(st.integers(0, 4), max_size=3))
    first = draw(st.integers(0, 1))
    starts = [first + sum(counts[:i]) for i in range(len(counts) + 1)]
    lengths = [draw(st.integers(count, MAX_BLOCKS * BLOCK_SIZE)) for count in counts]
    block = st.integers(0, BLOCKS - 1)
    table = draw(st.lists(block, min_size=MAX_BLOCKS * len(counts), max_size=9))
    table = draw(spoiled(table[: MAX_BLOCKS * len(counts)]))
    rows = [table[i * MAX_BLOCKS : (i + 1) * MAX_BLOCKS] for i in range(len(counts))]
    return rows, draw(spoiled(lengths)), draw(spoiled(starts))


def attention_mistakes(
    table: list[list[int]], lengths: list[int], starts: list[int], tokens: int
) -> set[int]:
    found = set()
    for i, length in enumerate(lengths):
        first, end = starts[i], starts[i + 1]
        if not 0 <= first <= end <= tokens:
            found.add(index_checks.QUERIES)
        if not end - first <= length <= MAX_BLOCKS * BLOCK_SIZE:
            found.add(index_checks.LENGTHS)
        elif end > first and any(
            not 0 <= block < BLOCKS for block in table[i][: -(-length // BLOCK_SIZE)]
        ):
            found.add(index_checks.BLOCKS)
    if not lengths and not 0 <= starts[0] <= tokens:
        found.add(index_checks.QUERIES)
    return found


@forms
@many
@given(sequences())
def test_attention(form: str, given: tuple[list[list[int]], list[int], list[int]]) -> None:
    torch.manual_seed(0)
    table, lengths, starts = given
    q = torch.randn(TOKENS, HEADS, DIM)
    k_blocks, v_blocks = torch.randn(2, BLOCKS, BLOCK_SIZE, 1, DIM)
    where = (ints(table).view(-1, MAX_BLOCKS), ints(lengths), ints(starts))
    out = torch.ones_like(q)
    mistakes = attention_mistakes(table, lengths, starts, TOKENS)

    def call() -> Tensor:
        return mk.paged_attention(
            q, k_blocks, v_blocks, *where, scale=0.5, max_query_len=4, max_seq_len=12, out=out
        )

    run(form, call, mistakes, [q, k_blocks, v_blocks, out])
    if not mistakes:
        expected = reference.paged_attention(q, k_blocks, v_blocks, *where, scale=0.5)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


# Rotary positions and the KV store ----------------------------------------------------------------


@forms
@many
@given(st.integers(0, 5), st.data())
def test_rope_store_kv(form: str, tokens: int, data: st.DataObject) -> None:
    torch.manual_seed(0)
    size = BLOCKS * BLOCK_SIZE
    honest = data.draw(st.lists(st.integers(0, POSITIONS - 1), min_size=tokens, max_size=tokens))
    positions = data.draw(spoiled(honest, WIDE_LIES))
    order = data.draw(st.permutations(range(size)))[:tokens]
    slots = data.draw(spoiled(order, WIDE_LIES))
    q, k, v = torch.randn(tokens, HEADS, DIM), *torch.randn(2, tokens, 1, DIM)
    cos, sin = torch.randn(2, POSITIONS, DIM // 2)
    cache = list(torch.randn(2, BLOCKS, BLOCK_SIZE, 1, DIM))
    args = [q, k, v, cos, sin, torch.tensor(positions).long(), torch.tensor(slots).long(), *cache]
    expected = [tensor.clone() for tensor in args]
    mistakes = set()
    if not all(0 <= position < POSITIONS for position in positions):
        mistakes.add(index_checks.POSITIONS)
    if not all(-1 <= slot < size for slot in slots):
        mistakes.add(index_checks.SLOTS)
    run(form, lambda: mk.rope_store_kv_(*args), mistakes, args)
    if not mistakes:
        reference.rope_store_kv_(*expected)
        torch.testing.assert_close(q, expected[0])
        # Of two tokens in one slot nobody says which stays.
        twice = {slot for slot in slots if slots.count(slot) > 1}
        once = [slot for slot in range(size) if slot not in twice]
        for found, wanted in zip(args[7:], expected[7:], strict=True):
            torch.testing.assert_close(found.flatten(0, 1)[once], wanted.flatten(0, 1)[once])
