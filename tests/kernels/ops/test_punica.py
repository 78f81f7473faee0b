"""`sgmv_` and `bgmv_` against what Punica says of them, in plain loops."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

import multilora_kernels as mk

if TYPE_CHECKING:
    from collections.abc import Callable

SLOTS, LAYERS, IN, OUT = 3, 2, 20, 30
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2.5e-2}
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: str(d)[6:])
ranks = pytest.mark.parametrize("rank", [8, 24])


def weights(rank: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    wa = torch.randn(SLOTS, LAYERS, rank, IN) / IN**0.5
    return wa.to(dtype), (torch.randn(SLOTS, LAYERS, rank, OUT) / rank**0.5).to(dtype)


def rows(count: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(count, OUT).to(dtype), torch.randn(count, IN).to(dtype)


def delta(x: Tensor, wa: Tensor, wb: Tensor, slot: int, layer: int) -> Tensor:
    return x.double() @ wa[slot, layer].double().T @ wb[slot, layer].double()


def assert_close(found: Tensor, expected: Tensor) -> None:
    tolerance = TOLERANCE[found.dtype]
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("layer", range(LAYERS))
@ranks
@dtypes
def test_bgmv(dtype: torch.dtype, rank: int, layer: int, index_dtype: torch.dtype) -> None:
    indices = [2, 0, 0, -1, 1, 2, -1]
    (y, x), (wa, wb) = rows(len(indices), dtype), weights(rank, dtype)
    expected = y.double()
    for i, slot in enumerate(indices):
        if slot >= 0:
            expected[i] += 0.5 * delta(x[i], wa, wb, slot, layer)
    before = y.clone()
    mk.bgmv_(y, x, wa, wb, torch.tensor(indices, dtype=index_dtype), layer, 0.5)
    assert_close(y, expected)
    assert torch.equal(y[[3, 6]], before[[3, 6]])


# Segments of one adapter side by side, empty ones, one longer than a tile, tokens of none.
CASES = [
    ([2, 0, -1, 0], [0, 5, 9, 11, 20]),
    ([1, 1, 2], [0, 3, 3, 90]),
    ([0, 2], [4, 6, 9]),
    ([1], [0, 1]),
    ([], [0]),
]


@pytest.mark.parametrize(("slots", "starts"), CASES, ids=str)
@ranks
@dtypes
def test_sgmv(dtype: torch.dtype, rank: int, slots: list[int], starts: list[int]) -> None:
    (y, x), (wa, wb) = rows(starts[-1] + 3, dtype), weights(rank, dtype)
    expected = y.double()
    for slot, first, end in zip(slots, starts, starts[1:], strict=False):
        if slot >= 0:
            expected[first:end] += 2 * delta(x[first:end], wa, wb, slot, 1)
    mk.sgmv_(y, x, wa, wb, torch.tensor(slots).int(), torch.tensor(starts).int(), 1, 2.0)
    assert_close(y, expected)


def test_both_are_one_arithmetic() -> None:
    """A token's bits are the same in a segment and alone."""
    (y, x), (wa, wb) = rows(40), weights(16)
    slots, starts = torch.tensor([2, -1, 1]).int(), torch.tensor([0, 20, 25, 40]).int()
    by_segment, by_token = y.clone(), y.clone()
    mk.sgmv_(by_segment, x, wa, wb, slots, starts, 0)
    mk.bgmv_(by_token, x, wa, wb, slots.repeat_interleave(starts.diff()), 0)
    assert torch.equal(by_segment, by_token)


(Y, X), (WA, WB) = rows(4), weights(8)
ONE, FOUR = torch.zeros(1).int(), torch.zeros(4).int()


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: mk.bgmv_(Y, X, WA, WB, ONE, 0), "4 tokens have 1 indices"),
        (lambda: mk.bgmv_(Y, X, WA, WB, FOUR, 2), "layer_idx 2"),
        (lambda: mk.bgmv_(Y, X, WA[:, :, :4], WB[:, :, :4], FOUR, 0), "contiguous"),
        (lambda: mk.bgmv_(Y, X, *(w[..., :5, :].clone() for w in (WA, WB)), FOUR, 0), "rank 5"),
        (lambda: mk.bgmv_(Y, X, WA[:2], WB, FOUR, 0), "same slots"),
        (lambda: mk.bgmv_(Y, X, WA[0], WB[0], FOUR, 0), "layers, rank"),
        (lambda: mk.sgmv_(Y, X, WA, WB, ONE, ONE, 0), "1 segments have 2 bounds, not 1"),
        (lambda: mk.sgmv_(Y, X[:, :9], WA, WB, ONE, FOUR[:2], 0), "9 columns"),
    ],
)
def test_mistakes_raise(call: Callable[[], None], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        call()


def test_an_adapter_out_of_range_is_refused() -> None:
    with pytest.raises(IndexError, match="slot"):
        mk.bgmv_(Y.clone(), X, WA, WB, torch.full((4,), SLOTS), 0)
