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


BIAS = torch.randn(10).bfloat16()


@pytest.mark.parametrize("bias", [BIAS[:9], BIAS.float(), BIAS[None]], ids=["9", "fp32", "matrix"])
@pytest.mark.parametrize("is_packed", [False, True], ids=["plain", "packed"])
def test_a_bias_that_does_not_fit_is_refused(bias: torch.Tensor, is_packed: bool) -> None:
    """C++ would take its bytes for as many bf16 as there are outputs."""
    x, weight = torch.randn(3, 64).bfloat16(), torch.randn(10, 64).bfloat16()
    with pytest.raises(ValueError, match=r"bias must be \[10\] of torch.bfloat16"):
        mk.linear(x, mk.pack(weight) if is_packed else weight, bias)


def test_a_bias_may_have_any_stride() -> None:
    x, packed = torch.randn(3, 64), mk.pack(torch.randn(10, 64) / 8)
    bias = torch.randn(10, 2)[:, 1]
    assert_close(mk.linear(x, packed, bias), reference.linear(x, mk.unpack(packed), bias))


def test_a_packed_weight_takes_a_matrix() -> None:
    with pytest.raises(ValueError, match="tokens, in"):
        mk.linear(torch.randn(2, 64, 64), mk.pack(torch.randn(10, 64)))


def test_columns_that_disagree_raise() -> None:
    with pytest.raises(ValueError, match="3 columns"):
        mk.linear(torch.zeros(2, 3), torch.zeros(5, 4))
