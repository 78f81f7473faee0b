"""The floor's formula, against sums by hand."""

from __future__ import annotations

import pytest
from floor import Floor, Peaks, floor_of
from work import SHAPES

SHAPE = SHAPES["tiny"]
SIZE = {"requests": 2, "prompt": 8, "new": 5}


def peaks(fma: float, read: float) -> Peaks:
    return Peaks(threads=1, fma=fma, bf16_dot=2 * fma, int8_dot=4 * fma, read=read)


def test_bytes_bound_it_when_memory_is_slow() -> None:
    found = floor_of(SHAPE, peaks(1e9, 1.0), "bf16", "base", **SIZE)
    step = 2 * (SHAPE.body + SHAPE.head) / 1e9
    assert found.prefill == pytest.approx(step)
    assert found.decode == pytest.approx(4 * step)


def test_flops_bound_it_when_arithmetic_is_slow() -> None:
    found = floor_of(SHAPE, peaks(1.0, 1e9), "fp32", "base", **SIZE)
    assert found.prefill == pytest.approx(2 * 2 * (8 * SHAPE.body + SHAPE.head) / 1e9)
    assert found.decode == pytest.approx(4 * 2 * 2 * (SHAPE.body + SHAPE.head) / 1e9)
    assert found.total == found.prefill + found.decode


def test_each_adapter_is_read_once_and_multiplied_for_each_row() -> None:
    slow_memory, slow_sums = peaks(1e9, 1.0), peaks(1.0, 1e9)

    def added(case: str, rates: Peaks) -> float:
        return (
            floor_of(SHAPE, rates, "fp32", case, **SIZE).decode
            - floor_of(SHAPE, rates, "fp32", "base", **SIZE).decode
        )

    per_rank = SHAPE.per_rank / 1e9
    assert added("distinct", slow_memory) == pytest.approx(4 * 4 * (8 + 16) * per_rank)
    assert added("identical", slow_memory) == pytest.approx(4 * 4 * 32 * per_rank)
    assert added("distinct", slow_sums) == pytest.approx(4 * 2 * (8 + 16) * per_rank)
    assert added("identical", slow_sums) == pytest.approx(4 * 2 * (32 + 32) * per_rank)


def test_dot_products_raise_the_peak_of_narrow_weights_alone() -> None:
    rates = peaks(1.0, 1e9)

    def floor(precision: str, dots: bool) -> Floor:
        return floor_of(SHAPE, rates, precision, "base", dots=dots, **SIZE)

    assert floor("fp32", True) == floor("fp32", False)
    assert floor("bf16", True).total == pytest.approx(floor("bf16", False).total / 2)
    assert floor("int4", True).total == pytest.approx(floor("int4", False).total / 4)
