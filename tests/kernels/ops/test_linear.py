"""Products with plain weights on a CPU against `reference`; test_packed_weight has packed ones."""

from __future__ import annotations

import pytest
import torch

import multilora_kernels as mk
from multilora_kernels import reference
from multilora_kernels.testing.precision import assert_close, to_float64
from tests.harness.kernel_calls.dtypes import by_dtype


@pytest.mark.parametrize("with_bias", [False, True])
@by_dtype
def test_linear(dtype: torch.dtype, with_bias: bool) -> None:
    x, weight = torch.randn(17, 33).to(dtype), (torch.randn(47, 33) / 6).to(dtype)
    bias = torch.randn(47).to(dtype) if with_bias else None
    assert_close(mk.linear(x, weight, bias), reference.linear(*to_float64(x, weight, bias)))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("width", [34, 320])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_of_sixteen_rows_are_their_own(dtype: torch.dtype, width: int) -> None:
    x, weight = torch.randn(128, width).to(dtype), torch.randn(47, width).to(dtype)
    whole = mk.linear(x, weight)
    for rows in [*torch.arange(128).split(16), torch.arange(128).flip(0)]:
        assert torch.equal(mk.linear(x[rows], weight), whole[rows])


def test_columns_that_disagree_raise() -> None:
    with pytest.raises(ValueError, match="3 columns"):
        mk.linear(torch.zeros(2, 3), torch.zeros(5, 4))
