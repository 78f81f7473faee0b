"""`make_tiles`: which runs of tokens become tiles, and how many tiles can come of it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from multilora_kernels import Tiles, make_tiles
from multilora_kernels.tiles import capacity


def from_tensor(slots: list[int], tile: int, size: int | None = None) -> Tiles:
    return make_tiles(torch.tensor(slots, dtype=torch.int32), tile, size)


makers = pytest.mark.parametrize("make", [make_tiles, from_tensor], ids=["list", "tensor"])


def rows(
    slots: list[int], tile: int, make: Callable[..., Tiles] = make_tiles
) -> list[tuple[int, int, int]]:
    """The real tiles as (slot, start, len)."""
    tiles = make(slots, tile)
    count = int(tiles.num_tiles)
    columns = (tiles.slots, tiles.starts, tiles.lens)
    return list(zip(*(column[:count].tolist() for column in columns), strict=True))


@pytest.mark.parametrize(
    ("slots", "expected"),
    [
        pytest.param([], [], id="empty"),
        pytest.param([-1] * 20, [], id="all base"),
        pytest.param([3], [(3, 0, 1)], id="one row"),
        pytest.param([0, 1, 2], [(0, 0, 1), (1, 1, 1), (2, 2, 1)], id="distinct rows"),
        pytest.param([5] * 16, [(5, 0, 16)], id="exactly one tile"),
        pytest.param([5] * 17, [(5, 0, 16), (5, 16, 1)], id="17 rows"),
        pytest.param([-1, 2, 2, -1, 2], [(2, 1, 2), (2, 4, 1)], id="base between"),
        pytest.param([-1, -1, 4, -1], [(4, 2, 1)], id="base around"),
        pytest.param(
            [1] * 18 + [0] * 2 + [1],
            [(1, 0, 16), (1, 16, 2), (0, 18, 2), (1, 20, 1)],
            id="slots change inside",
        ),
    ],
)
@makers
def test_runs_of_one_slot_become_tiles(
    make: Callable[..., Tiles], slots: list[int], expected: list[tuple[int, int, int]]
) -> None:
    assert rows(slots, 16, make) == expected


def test_the_tile_length_is_the_callers() -> None:
    assert rows([0] * 17, 64) == [(0, 0, 17)]


@makers
@pytest.mark.parametrize("size", [2, 5])
def test_a_fixed_capacity_is_padded_with_empty_tiles(size: int, make: Callable[..., Tiles]) -> None:
    tiles = make([7] * 17, 16, size)
    assert tiles.slots.tolist() == [7, 7] + [-1] * (size - 2)
    assert tiles.starts.tolist() == [0, 16] + [0] * (size - 2)
    assert tiles.lens.tolist() == [16, 1] + [0] * (size - 2)
    assert tiles.num_tiles.tolist() == [2]


@makers
@pytest.mark.parametrize(("slots", "size"), [([], 0), ([], 3), ([-1, 2], None)])
def test_all_columns_are_contiguous_int32(
    slots: list[int], size: int | None, make: Callable[..., Tiles]
) -> None:
    for column in make(slots, 16, size):
        assert column.dtype == torch.int32
        assert column.dim() == 1
        assert column.is_contiguous()


def test_tiles_beyond_the_capacity_raise() -> None:
    with pytest.raises(ValueError, match="3 tiles do not fit a capacity of 2"):
        make_tiles([0, 1, 2], 16, 2)


def test_tiles_of_a_tensor_beyond_the_capacity_fail_on_its_device() -> None:
    with pytest.raises(RuntimeError, match="more tiles than its size"):
        from_tensor([0, 1, 2], 16, 2)


@makers
def test_a_tile_of_nothing_is_refused(make: Callable[..., Tiles]) -> None:
    with pytest.raises(ValueError, match="at least one token, not 0"):
        make([1], 0)


def test_a_tensors_tiles_are_the_lists() -> None:
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies
    runs = st.lists(st.tuples(st.integers(-2, 3), st.integers(1, 40)), max_size=12)
    dtypes = st.sampled_from([torch.int32, torch.int64, torch.int16])

    @hypothesis.settings(max_examples=200)
    @hypothesis.given(runs, st.sampled_from([1, 3, 16, 64]), st.integers(0, 5), dtypes)
    def check(runs: list[tuple[int, int]], tile: int, more: int, dtype: torch.dtype) -> None:
        slots = [slot for slot, count in runs for _ in range(count)]
        size = len(make_tiles(slots, tile).slots) + more
        for found, expected in zip(
            make_tiles(torch.tensor(slots, dtype=dtype), tile, size),
            make_tiles(slots, tile, size),
            strict=True,
        ):
            assert found.dtype == expected.dtype
            assert torch.equal(found, expected)

    check()


class NoHostReads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses what a CUDA graph cannot capture: a look at a value, or a shape that follows one."""

    READS = ("_local_scalar_dense", "nonzero", "masked_select", "item", "is_nonzero", "equal")

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        assert func.overloadpacket.__name__ not in self.READS, func
        return func(*args, **(kwargs or {}))


def test_a_graph_may_capture_the_tiles_of_a_tensor() -> None:
    """Nothing is read on the host, and shapes are known without any value."""
    slots = torch.tensor([0, 0, -1, 2], dtype=torch.int32)
    with NoHostReads():  # type: ignore[no-untyped-call]
        make_tiles(slots, 16, 5)
        with pytest.raises(AssertionError, match="_local_scalar_dense"):
            int(slots[0])
    for column, expected in zip(make_tiles(slots.to("meta"), 16, 5), (5, 5, 5, 1), strict=True):
        assert column.shape == (expected,)


def test_capacity_bounds_every_batch_and_tiles_cover_it() -> None:
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies
    runs = st.lists(st.tuples(st.integers(-1, 3), st.integers(1, 40)), max_size=12)

    @hypothesis.settings(max_examples=60)
    @hypothesis.given(runs, st.sampled_from([1, 16, 64]))
    def check(runs: list[tuple[int, int]], tile: int) -> None:
        slots = [slot for slot, count in runs for _ in range(count)]
        segments = sum(1 for slot, _ in groupby(slots) if slot >= 0)
        found = rows(slots, tile)
        assert len(found) <= capacity(len(slots), segments, tile)
        covered = [-1] * len(slots)
        for slot, start, length in found:
            assert 1 <= length <= tile
            assert covered[start : start + length] == [-1] * length  # no token twice
            covered[start : start + length] = [slot] * length
        assert covered == slots

    check()
