"""The Triton LoRA kernels against `reference` in float64, under the guard, and bit for bit."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from multilora_kernels import Table, make_tiles, reference
from multilora_kernels.cuda import launch_plans, lora
from multilora_kernels.testing.guard import guarded
from multilora_kernels.testing.precision import TOLERANCE, assert_close, to_float64
from tests.harness.kernel_calls.dtypes import by_dtype
from tests.harness.kernel_calls.lora import (
    POPULARITY,
    RANKS,
    LoraCall,
    make_embedding_call,
    make_lora_call,
    make_table,
)

DTYPES = tuple(TOLERANCE)
popularities = pytest.mark.parametrize("popularity", POPULARITY)


def small_target(**changed: int) -> launch_plans.CudaTarget:
    """Two multiprocessors, so that programs loop; tiles small enough for an interpreter."""
    arithmetic = {
        "lora_shrink": {"block_k": 64, "split_k": 2},
        "lora_expand": {"block_pages": 2},
    }
    schedule = {
        "lora_shrink": {"block_m": 16, "block_pages": 4, "column_programs": 2},
        "lora_expand": {"block_m": 16, "block_n": 64, "programs_per_sm": 2},
    }
    for entries in (*arithmetic.values(), *schedule.values()):
        entries |= {name: changed[name] for name in entries if name in changed}
    warps = {"num_warps": 4, "num_stages": 1}
    ops = {
        op: {"*": {"arithmetic": arithmetic[op], "schedule": {"*": schedule[op] | warps}}}
        for op in arithmetic
    }
    return launch_plans.CudaTarget(90, 2, launch_plans.LaunchPlans(ops))


def run(call: LoraCall, where: launch_plans.CudaTarget | None = None, **guard: Any) -> Tensor:
    with guarded(**guard):
        lora.lora_(*call, where or small_target())
    return call.y


def expected(call: LoraCall) -> Tensor:
    wide = LoraCall(*to_float64(*call))
    reference.lora_(*wide)
    return wide.y


def base_rows(popularity: str) -> Tensor:
    return torch.tensor(POPULARITY[popularity], dtype=torch.long) < 0


# Right ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dora", [False, True], ids=["plain", "dora"])
@by_dtype
@popularities
def test_lora_adds_each_rows_delta(popularity: str, dtype: torch.dtype, dora: bool) -> None:
    """Mixed ranks 8 to 128, weighted pages, more capacity than tiles."""
    slots = POPULARITY[popularity]
    call = make_lora_call(slots, dtype, dora=dora, tile=64, size=len(slots) + 3)
    before, wanted = call.y.clone(), expected(call)
    assert_close(run(call, order=1), wanted)
    base = base_rows(popularity)
    assert torch.equal(call.y[base], before[base])
    assert base.all() or not torch.equal(call.y, before)


@pytest.mark.parametrize(
    ("in_", "starts"),
    [
        (33, (0, 5, 30, 47)),
        (64, (0, 64)),
        (200, (0, 100, 200)),
        (16, (0, 8, 16)),
        (1, (0, 1)),
        (130, (0, 64, 65)),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_odd_widths(dtype: torch.dtype, in_: int, starts: tuple[int, ...]) -> None:
    call = make_lora_call([0, 2, 2, -1, 4], dtype, in_=in_, starts=starts)
    wanted = expected(call)
    assert_close(run(call, order=2), wanted)


def test_rank_512_beside_rank_8() -> None:
    call = make_lora_call([0, 1, 1], torch.bfloat16, ranks=(8, 512), in_=64, starts=(0, 32))
    wanted = expected(call)
    assert_close(run(call), wanted)


@by_dtype
def test_strided_rows(dtype: torch.dtype) -> None:
    """Columns of a wider tensor, as the q, k, v part of a fused output."""
    call = make_lora_call([0, 3, 3, -1], dtype)
    wide_x, wide_y = torch.full((2, 4, 300), torch.nan, dtype=dtype)
    call = call._replace(x=wide_x[:, 20:180].copy_(call.x), y=wide_y[:, 40:168].copy_(call.y))
    wanted = expected(call)
    assert_close(run(call), wanted)
    assert wide_y[:, :40].isnan().all()
    assert wide_y[:, 168:].isnan().all()


@pytest.mark.parametrize("page_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pages_of_another_type(dtype: torch.dtype, page_dtype: torch.dtype) -> None:
    call = make_lora_call([0, 3, 3, -1], dtype, starts=(0, 64))
    call = call._replace(a_pages=call.a_pages.to(page_dtype), b_pages=call.b_pages.to(page_dtype))
    wanted = expected(call)
    # u is rounded to the pages' type, which the reference in float64 does not do.
    narrowest = min(dtype, page_dtype, key=lambda d: d.itemsize)
    assert_close(run(call).to(narrowest), wanted)


def test_a_table_that_is_a_view_of_all_sites() -> None:
    call = make_lora_call([0, 3, 3, -1], torch.bfloat16)
    wanted = expected(call)
    ids, weights = (
        torch.stack([torch.full_like(t, 99), t], 1)[:, 1]
        for t in (call.table.page_ids, call.table.page_weights)
    )
    assert not ids.is_contiguous()
    call = call._replace(table=call.table._replace(page_ids=ids, page_weights=weights))
    assert_close(run(call), wanted)


@by_dtype
def test_a_narrower_view_of_the_table_gives_the_same_bits(dtype: torch.dtype) -> None:
    """As a step takes whose slots have no more pages; slot 4, which none names, has 16."""
    call = make_lora_call([0, 3, 3, -1, 2, 5], dtype, dora=True, tile=64)
    few = call.table._replace(
        page_ids=call.table.page_ids[:, :8], page_weights=call.table.page_weights[:, :8]
    )
    narrow = call.copy(table=few)
    assert torch.equal(run(narrow), run(call))
    with guarded():
        planes = lora.lora_shrink(*call[1:3], few, call.tiles, 2, small_target())
    assert planes.shape[2] == 3 * 8 * 8


def test_a_slot_without_pages_at_this_site_leaves_its_rows() -> None:
    call = make_lora_call([0, 1, 2], torch.bfloat16)
    call.table.num_pages[1] = 0
    call.y[1, 0] = -0.0
    before, wanted = call.y.clone(), expected(call)
    assert_close(run(call), wanted)
    assert torch.equal(call.y[1].view(torch.int16), before[1].view(torch.int16))


@pytest.mark.parametrize("split_k", [1, 3])
@by_dtype
def test_shrink_then_expand_ignores_what_lies_beyond_a_rows_pages(
    dtype: torch.dtype, split_k: int
) -> None:
    slots = POPULARITY["skewed"]
    call = make_lora_call(slots, dtype, dora=True, tile=64)
    wanted = expected(call)
    with guarded(order=3):
        planes = lora.lora_shrink(*call[1:3], *call[4:6], split_k, small_target())
    max_pages = call.table.page_ids.shape[1]
    assert planes.shape == (split_k, len(slots), 3 * max_pages * 8)
    assert planes.dtype == torch.float32
    by_page = planes.view(split_k, len(slots), 3, max_pages, 8)
    for row, slot in enumerate(slots):
        by_page[:, row, :, RANKS[slot] // 8 if slot >= 0 else 0 :] = torch.nan
    with guarded(order=3):
        lora.lora_expand_(call.y, planes, *call[3:], small_target())
    assert_close(call.y, wanted)


@by_dtype
def test_planes_are_the_references(dtype: torch.dtype) -> None:
    call = make_lora_call([0, 2, 2], dtype, ranks=(24, 24, 24))
    planes = lora.lora_shrink(*call[1:3], *call[4:6], 3, small_target())
    wanted = reference.lora_shrink(*to_float64(*call[1:3]), *call[4:6], 3)
    by_page, wanted = (p.sum(0).view(3, 3, -1, 8)[:, :, :3] for p in (planes, wanted))
    torch.testing.assert_close(by_page.double(), wanted, rtol=1e-5, atol=1e-5)


@by_dtype
@popularities
def test_lora_embed_takes_the_tokens_column(popularity: str, dtype: torch.dtype) -> None:
    slots = POPULARITY[popularity]
    call = make_embedding_call(slots, dtype, dora=True, starts=(0, 96), size=len(slots) + 1)
    before, wide = call.y.clone(), to_float64(*call)
    with guarded(order=1):
        lora.lora_embed_(*call, small_target())
    reference.lora_embed_(*wide)
    assert_close(call.y, wide[0])
    assert torch.equal(call.y[base_rows(popularity)], before[base_rows(popularity)])


@pytest.mark.slow
def test_a_site_of_llama_8b_with_its_own_plan() -> None:
    call = make_lora_call([0, 1, 1, 3], torch.bfloat16, in_=4096, starts=(0, 4096, 5120, 6144))
    wanted = expected(call)
    assert_close(run(call, launch_plans.target(90, 132)), wanted)


def test_the_plan_tables_give_right_results() -> None:
    for sm in launch_plans.ARCHITECTURES:
        for tile in (16, 64):
            call = make_lora_call(
                [2] * 20 + [3], torch.bfloat16, in_=320, starts=(0, 256), tile=tile
            )
            wanted = expected(call)
            assert_close(run(call, launch_plans.target(sm, 2)), wanted)


# The same bits ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_the_order_of_programs_changes_no_bit(dtype: torch.dtype) -> None:
    call = make_lora_call(POPULARITY["zipf"], dtype, dora=True, starts=(0, 64, 128))
    first = run(call.copy())
    for order in range(3):
        assert torch.equal(run(call.copy(), order=order), first)


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_a_rows_bits_are_its_own(dtype: torch.dtype) -> None:
    """Rows alone, and in another order with other neighbours, under other tile heights."""
    slots = POPULARITY["uniform"]
    call = make_lora_call(slots, dtype, dora=True, starts=(0, 64, 128))
    whole = run(call.copy())
    shuffled = random.Random(0).sample(range(len(slots)), len(slots))
    for rows, tile in ((shuffled, 16), (shuffled[:5], 64), ([0], 16), ([len(slots) - 1], 64)):
        tiles = make_tiles([slots[row] for row in rows], tile)
        part = run(call.copy(y=call.y[rows], x=call.x[rows], tiles=tiles))
        assert torch.equal(part, whole[rows])


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize(
    "changed",
    [
        {"block_m": 64},
        {"block_m": 32, "block_n": 128, "block_pages": 2},
        {"block_n": 32, "column_programs": 1, "programs_per_sm": 1},
    ],
    ids=["64 rows", "32 rows", "other columns"],
)
def test_the_schedule_changes_no_bit(dtype: torch.dtype, changed: dict[str, int]) -> None:
    """BGMV's tiles of 16 rows and SGMV's of 64 are one arithmetic."""
    slots = [3] * 64 + [1] * 17 + [4]
    call = make_lora_call(slots, dtype, starts=(0, 64, 128))
    low = run(call.copy())
    high = run(call.copy(tiles=make_tiles(slots, 64)), small_target(**changed))
    assert torch.equal(low, high)


def test_counts_are_read_on_the_small_target() -> None:
    """What a CUDA graph replays: the same tensors with other contents."""
    call = make_lora_call([1] * 20, torch.bfloat16, size=12)
    for slots in ([-1] * 20, [4] * 3 + [-1] * 16 + [0], list(range(8)) + [2] * 12):
        for kept, new in zip(call.tiles, make_tiles(slots, 16, 12), strict=True):
            kept.copy_(new)
        again = call.copy()
        wanted = expected(again)
        assert_close(run(again), wanted)


# Mistakes ---------------------------------------------------------------------------------------


def test_what_the_kernels_cannot_address_is_refused() -> None:
    call = make_lora_call([0, 1], torch.float32)
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("x is torch.float64", {"x": call.x.double()}),
        ("x must be contiguous", {"x": call.x.repeat_interleave(2, 1)[:, ::2]}),
        ("b_pages must be contiguous", {"b_pages": call.b_pages.mT.contiguous().mT}),
        ("num_pages", {"table": call.table._replace(num_pages=torch.zeros(18).int()[::2])}),
        ("rows", {"table": call.table._replace(page_ids=call.table.page_ids.T.contiguous().T)}),
    ]
    for message, changed in wrong:
        with pytest.raises(ValueError, match=message):
            lora.lora_(*call._replace(**changed), small_target())


def test_planes_must_be_what_shrink_makes() -> None:
    call = make_lora_call([0, 1], torch.float32)
    planes = lora.lora_shrink(*call[1:3], *call[4:6], 2, small_target())
    with pytest.raises(ValueError, match="contiguous float32"):
        lora.lora_expand_(call.y, planes[..., ::2], *call[3:], small_target())


def test_no_rows_no_tiles_and_no_pages_launch_nothing() -> None:
    call = make_lora_call([-1, -1], torch.float32)
    before = call.y.clone()
    assert torch.equal(run(call), before)
    table, _ = make_table(128, torch.float32)
    none = Table(table.page_ids[:, :0], table.page_weights[:, :0], table.num_pages * 0)
    assert torch.equal(run(call._replace(table=none, tiles=make_tiles([0, 0], 16))), before)
