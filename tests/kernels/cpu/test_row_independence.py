"""A row's bits are its own: padded counts, and elementwise functions that see whole vectors."""

from __future__ import annotations

import pytest
import torch

from multilora_kernels.cpu.row_independence import ROWS, flat, padded


def test_counts_are_padded_to_whole_groups_of_rows() -> None:
    assert [padded(count) for count in (0, 1, ROWS, ROWS + 1)] == [0, ROWS, ROWS, 2 * ROWS]


@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 32_767, 32_769, 70_001])
def test_every_element_is_computed_in_whole_vectors(size: int) -> None:
    seen: list[int] = []

    def function(part: torch.Tensor) -> torch.Tensor:
        seen.append(part.numel())
        return part + 1

    x = torch.randn(size)
    assert torch.equal(flat(function, x), x + 1)
    assert all(count % 64 == 0 and count <= 32_768 for count in seen)


def test_the_shape_stays() -> None:
    assert flat(torch.exp, torch.zeros(3, 5, 7)).shape == (3, 5, 7)


@pytest.mark.parametrize("function", [torch.exp, torch.nn.functional.silu])
def test_an_elements_bits_do_not_depend_on_its_place(function: torch.nn.Module) -> None:
    x = torch.randn(200)
    whole = flat(function, x)
    for start, count in ((0, 1), (17, 50), (150, 50)):
        part = x[start : start + count]
        assert torch.equal(flat(function, part), whole[start : start + count])
