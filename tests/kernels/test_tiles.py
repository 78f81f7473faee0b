"""`make_tiles`: which runs of tokens become tiles, and how many tiles can come of it."""

from __future__ import annotations

from itertools import groupby

import pytest
import torch

from multilora_kernels import make_tiles
from multilora_kernels.tiles import capacity


def rows(slots: list[int], tile: int, size: int | None = None) -> list[tuple[int, int, int]]:
    """The real tiles as (slot, start, len)."""
    tiles = make_tiles(slots, tile, size)
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
def test_runs_of_one_slot_become_tiles(
    slots: list[int], expected: list[tuple[int, int, int]]
) -> None:
    assert rows(slots, 16) == expected


def test_the_tile_length_is_the_callers() -> None:
    assert rows([0] * 17, 64) == [(0, 0, 17)]


@pytest.mark.parametrize("size", [2, 5])
def test_a_fixed_capacity_is_padded_with_empty_tiles(size: int) -> None:
    tiles = make_tiles([7] * 17, 16, size)
    assert tiles.slots.tolist() == [7, 7] + [-1] * (size - 2)
    assert tiles.starts.tolist() == [0, 16] + [0] * (size - 2)
    assert tiles.lens.tolist() == [16, 1] + [0] * (size - 2)
    assert tiles.num_tiles.tolist() == [2]


@pytest.mark.parametrize(("slots", "size"), [([], 0), ([], 3), ([-1, 2], None)])
def test_all_columns_are_contiguous_int32(slots: list[int], size: int | None) -> None:
    for column in make_tiles(slots, 16, size):
        assert column.dtype == torch.int32
        assert column.dim() == 1
        assert column.is_contiguous()


def test_tiles_beyond_the_capacity_raise() -> None:
    with pytest.raises(ValueError, match="3 tiles do not fit a capacity of 2"):
        make_tiles([0, 1, 2], 16, 2)


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
