"""The LoRA ops on a CPU against `reference` in float64; a row's bits are its own."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

import multilora_kernels as mk
from multilora_kernels import Table, Tiles, make_tiles, reference
from multilora_kernels.cpu import lora as cpu_lora
from multilora_kernels.cpu import native
from multilora_kernels.testing.precision import assert_close, to_float64
from tests.harness.kernel_calls import lora as kernel_calls
from tests.harness.kernel_calls.dtypes import by_dtype
from tests.harness.kernel_calls.lora import RANKS, EmbeddingCall, LoraCall

if TYPE_CHECKING:
    from collections.abc import Callable

STARTS = (0, 5, 30, 47)  # slices of odd widths
SLOTS = {
    **kernel_calls.POPULARITY,
    "shuffled": random.Random(0).choices(range(8), k=24),
    "alone": [3],
}
by_popularity = pytest.mark.parametrize("popularity", SLOTS)
by_exact_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def make_lora_call(popularity: str, dtype: torch.dtype, **options: Any) -> LoraCall:
    """With odd widths and pages that begin anywhere, which a CPU takes."""
    options = {"in_": 33, "starts": STARTS, "aligned": False} | options
    return kernel_calls.make_lora_call(SLOTS[popularity], dtype, **options)


def make_embedding_call(popularity: str, dtype: torch.dtype, **options: Any) -> EmbeddingCall:
    options = {"starts": (0, 47), "aligned": False} | options
    return kernel_calls.make_embedding_call(SLOTS[popularity], dtype, **options)


def base_rows(popularity: str) -> Tensor:
    return torch.tensor(SLOTS[popularity], dtype=torch.long) < 0


@pytest.mark.parametrize("dora", [False, True], ids=["plain", "dora"])
@by_dtype
@by_popularity
def test_lora_adds_each_rows_delta(popularity: str, dtype: torch.dtype, dora: bool) -> None:
    call = make_lora_call(popularity, dtype, dora=dora, size=len(SLOTS[popularity]) + 1)
    before, wide = call.y.clone(), LoraCall(*to_float64(*call))
    mk.lora_(*call)
    reference.lora_(*wide)
    assert_close(call.y, wide.y)
    base = base_rows(popularity)
    assert torch.equal(call.y[base], before[base])
    assert base.all() or not torch.equal(call.y, before)


@pytest.mark.parametrize("split_k", [1, 3])
@by_dtype
@by_popularity
def test_shrink_then_expand_ignores_what_lies_beyond_a_rows_pages(
    popularity: str, dtype: torch.dtype, split_k: int
) -> None:
    call = make_lora_call(popularity, dtype, dora=True)
    before, wide = call.y.clone(), LoraCall(*to_float64(*call))
    planes = mk.lora_shrink(call.x, call.a_pages, call.table, call.tiles, split_k)
    max_pages = call.table.page_ids.shape[1]
    assert planes.shape == (split_k, len(call.x), 3 * max_pages * 8)
    assert planes.dtype == torch.float32
    by_page = planes.view(split_k, len(call.x), 3, max_pages, 8)
    for row, slot in enumerate(SLOTS[popularity]):
        by_page[:, row, :, RANKS[slot] // 8 if slot >= 0 else 0 :] = torch.nan
    mk.lora_expand_(call.y, planes, call.b_pages, *call[4:])
    reference.lora_(*wide)
    assert_close(call.y, wide.y)
    base = base_rows(popularity)
    assert torch.equal(call.y[base], before[base])


@by_dtype
def test_lora_head_is_lora_with_one_slice(dtype: torch.dtype) -> None:
    call = make_lora_call("shuffled", dtype, starts=(0, 47))
    wide = LoraCall(*to_float64(*call))
    mk.lora_head_(*call[:6])
    reference.lora_(*wide)
    assert_close(call.y, wide.y)


@by_dtype
@by_popularity
def test_lora_embed_takes_the_tokens_column(popularity: str, dtype: torch.dtype) -> None:
    call = make_embedding_call(popularity, dtype, dora=True)
    before, wide = call.y.clone(), EmbeddingCall(*to_float64(*call))
    mk.lora_embed_(*call)
    reference.lora_embed_(*wide)
    assert_close(call.y, wide.y)
    base = base_rows(popularity)
    assert torch.equal(call.y[base], before[base])


# Isolation ----------------------------------------------------------------------------------------


def narrow(table: Table, columns: int) -> Table:
    """Views of the first columns, as a step takes whose slots have no more pages."""
    ids, weights = table.page_ids[:, :columns], table.page_weights[:, :columns]
    return table._replace(page_ids=ids, page_weights=weights)


@pytest.mark.parametrize("columns", [5, 6])
@by_dtype
def test_a_narrower_view_of_the_table_gives_the_same_bits(
    dtype: torch.dtype, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slots that no tile names have more pages than the view. C++ takes it, where it is there."""
    if native.LIB is not None:
        monkeypatch.setattr(cpu_lora, "_expand", None)
    tiles = make_tiles([5, 5, 0, 2, 2, -1, 1], 16)
    call, embedding = (
        make_lora_call("distinct", dtype, dora=True),
        make_embedding_call("distinct", dtype),
    )
    for op, args, rest in (
        (mk.lora_, [call.x[:7], call.a_pages, call.b_pages], [tiles, STARTS]),
        (mk.lora_embed_, [embedding[1][:7], *embedding[2:4]], [tiles]),
    ):
        whole, part = call.y[:7].clone(), call.y[:7].clone()
        op(whole, *args, call.table, *rest)
        op(part, *args, narrow(call.table, columns), *rest)
        assert torch.equal(part, whole)
        assert not torch.equal(part, call.y[:7])


@pytest.mark.parametrize("columns", [2, 4])
def test_a_view_without_a_slots_pages_is_refused(columns: int) -> None:
    call = make_lora_call("distinct", torch.float32)
    with pytest.raises(IndexError, match="a number of pages"):
        mk.lora_(*call[:4], narrow(call.table, columns), *call[5:])


def assert_tiles_independent(
    add: Callable[[Tensor, Tensor, Tiles], object],  # changes y of (y, x, tiles)
    y: Tensor,
    x: Tensor,
    slots: list[int],
) -> None:
    """Each tile alone and the tiles in reverse order give the bits of the whole batch."""
    tiles = make_tiles(slots, 16)
    whole = y.clone()
    add(whole, x, tiles)
    spans = [
        torch.arange(start, start + count)
        for start, count in zip(tiles.starts.tolist(), tiles.lens.tolist(), strict=True)
    ]
    for rows in [*spans, torch.cat(spans[::-1])]:
        part = y[rows]
        add(part, x[rows], make_tiles([slots[i] for i in rows.tolist()], 16))
        assert torch.equal(part, whole[rows])


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(
    ("in_", "starts"),
    [
        (33, (0, 15, 30, 47)),
        (256, (0, 128, 320)),
        (33, STARTS),
    ],
)
@by_exact_dtype
def test_a_lora_rows_bits_are_its_own(
    dtype: torch.dtype, in_: int, starts: tuple[int, ...]
) -> None:
    call = make_lora_call("skewed", dtype, dora=True, in_=in_, starts=starts)

    def add(y: Tensor, x: Tensor, tiles: Tiles) -> None:
        mk.lora_(y, x, call.a_pages, call.b_pages, call.table, tiles, starts)

    assert_tiles_independent(add, call.y, call.x, SLOTS["skewed"])


@pytest.mark.usefixtures("threads")
@by_exact_dtype
def test_an_embedding_rows_bits_are_its_own(dtype: torch.dtype) -> None:
    y, ids, a_pages, b_pages, table, _ = make_embedding_call("shuffled", dtype)

    def add(y: Tensor, ids: Tensor, tiles: Tiles) -> None:
        mk.lora_embed_(y, ids, a_pages, b_pages, table, tiles)

    assert_tiles_independent(add, y, ids, SLOTS["shuffled"])


@pytest.mark.parametrize("weights_dtype", [None, torch.float32], ids=["same", "float32"])
@by_dtype
@by_popularity
def test_lora_columns_adds_to_the_slots_columns_alone(
    popularity: str, dtype: torch.dtype, weights_dtype: torch.dtype | None
) -> None:
    slots = SLOTS[popularity]
    call = kernel_calls.make_columns_call(
        slots, dtype, weights_dtype=weights_dtype, size=len(slots) + 1
    )
    before, wide = call.y.clone(), to_float64(*call)
    mk.lora_columns_(*call)
    reference.lora_columns_(*wide)
    assert_close(call.y, wide[0])
    ids, counts, _ = call.changes
    for row, slot in enumerate(slots):
        own = ids[slot, : counts[slot]].tolist() if slot >= 0 else []
        others = torch.tensor([c for c in range(call.y.shape[1]) if c not in own])
        assert torch.equal(call.y[row, others], before[row, others])


@pytest.mark.usefixtures("threads")
@by_exact_dtype
def test_a_columns_rows_bits_are_its_own(dtype: torch.dtype) -> None:
    y, x, changes, _ = kernel_calls.make_columns_call(SLOTS["skewed"], dtype, in_=133)

    def add(y: Tensor, x: Tensor, tiles: Tiles) -> None:
        mk.lora_columns_(y, x, changes, tiles)

    assert_tiles_independent(add, y, x, SLOTS["skewed"])


# Mistakes -----------------------------------------------------------------------------------------


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape)


TABLE = Table(*(torch.zeros(shape, dtype=torch.int32) for shape in ((1, 1), (1, 1), (1,))))
NONE = make_tiles([], 16)
COLUMNS = mk.Columns(
    torch.zeros(1, 8, dtype=torch.int32), torch.zeros(1, dtype=torch.int32), torch.zeros(1, 8, 3)
)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda f: mk.lora_shrink(f(2, 3), f(1, 1, 8, 4), TABLE, NONE), "3 columns"),
        (lambda f: mk.lora_shrink(f(2, 3), f(1, 8, 3), TABLE, NONE), "must be"),
        (lambda f: mk.lora_shrink(f(2, 3), f(1, 1, 8, 3), TABLE, NONE, 4), "split_k 4"),
        (lambda f: mk.lora_shrink(f(2, 3), f(1, 1, 8, 3), TABLE, NONE, 0), "split_k 0"),
        (
            lambda f: mk.lora_expand_(f(2, 5), f(1, 2, 8), f(1, 8, 4), TABLE, NONE, (0, 5)),
            "b_pages",
        ),
        (lambda f: mk.lora_expand_(f(2, 5), f(1, 2, 8), f(1, 8, 5), TABLE, NONE, (0, 4)), "span"),
        (
            lambda f: mk.lora_head_(f(2, 5), f(3, 3), f(1, 1, 8, 3), f(1, 8, 5), TABLE, NONE),
            "rows",
        ),
        (
            lambda f: mk.lora_head_(f(2, 5), f(2, 3), f(1, 2, 8, 3), f(1, 8, 5), TABLE, NONE),
            "slices",
        ),
        (
            lambda f: mk.lora_head_(f(2, 5), f(2, 3), f(1, 1, 7, 3), f(1, 8, 5), TABLE, NONE),
            "slices, 8, in",
        ),
        (
            lambda f: mk.lora_head_(f(2, 5), f(2, 3), f(1, 1, 8, 3), f(1, 7, 5), TABLE, NONE),
            "pages, 8, out",
        ),
        (
            lambda f: mk.lora_(
                f(2, 5), f(2, 3), f(1, 3, 8, 3), f(1, 8, 5), TABLE, NONE, (0, 4, 3, 5)
            ),
            "fall",
        ),
        (lambda f: mk.lora_columns_(f(2, 5), f(3, 3), COLUMNS, NONE), "rows"),
        (lambda f: mk.lora_columns_(f(2, 5), f(2, 4), COLUMNS, NONE), "4 columns"),
        (
            lambda f: mk.lora_columns_(
                f(2, 5), f(2, 3), COLUMNS._replace(weights=f(1, 7, 3)), NONE
            ),
            "multiple of 8",
        ),
        (
            lambda f: mk.lora_columns_(
                f(2, 5), f(2, 3), COLUMNS._replace(weights=f(2, 8, 3)), NONE
            ),
            "column_ids",
        ),
        (lambda f: mk.lora_embed_(f(2, 5), f(3), f(1, 9, 8), f(1, 8, 5), TABLE, NONE), "rows"),
        (lambda f: mk.lora_embed_(f(2, 5), f(2), f(1, 9, 7), f(1, 8, 5), TABLE, NONE), "vocab, 8"),
    ],
)
def test_shapes_that_disagree_raise(
    call: Callable[[Callable[..., Tensor]], object], match: str
) -> None:
    with pytest.raises(ValueError, match=match):
        call(zeros)


def test_pages_that_do_not_lie_one_value_after_the_other() -> None:
    """C++ takes pages that are dense within alone."""
    call = make_lora_call("distinct", torch.float32)
    wanted = call.copy()
    mk.lora_(*wanted)
    turned = [pages.mT.contiguous().mT for pages in (call.a_pages, call.b_pages)]
    assert turned[1].stride(-1) != 1
    found = call.copy(a_pages=turned[0], b_pages=turned[1])
    mk.lora_(*found)
    assert_close(found.y, wanted.y)
