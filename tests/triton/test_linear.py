"""The batch-invariant product in the interpreter, under the guard, against `reference`."""

from __future__ import annotations

import pytest
import torch

from multilora_kernels import reference
from multilora_kernels.cuda import linear
from multilora_kernels.testing.guard import guarded

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype)[6:])


@pytest.mark.parametrize("inner", [64, 100])
@pytest.mark.parametrize("rows", [1, 70])
@dtypes
def test_matmul(dtype: torch.dtype, rows: int, inner: int) -> None:
    x = torch.full((rows, inner + 24), torch.nan)[:, 8 : 8 + inner].to(dtype)
    x.copy_(torch.randn(rows, inner))
    weight = (torch.randn(150, inner) / inner**0.5).to(dtype)
    with guarded(order=1):
        found = linear.matmul(x, weight)
    want = reference.linear(x.double(), weight.double())
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(found.double(), want, rtol=tolerance, atol=tolerance)


def test_leading_dimensions_and_nothing() -> None:
    weight = torch.randn(5, 64).half()
    with guarded():
        assert linear.matmul(torch.randn(2, 3, 64).half(), weight).shape == (2, 3, 5)
        assert linear.matmul(torch.randn(0, 64).half(), weight).shape == (0, 5)
        assert (linear.matmul(torch.randn(2, 0).half(), weight[:, :0]) == 0).all()


def test_bits_do_not_depend_on_the_number_of_rows() -> None:
    """Every tile height and width, and every place in a tile."""
    x, weight = torch.randn(300, 200).bfloat16(), torch.randn(40, 200).bfloat16()
    schedules = {linear.schedule(count, 2) for count in (1, 65, 257)}
    assert len(schedules) == 3
    with guarded():
        whole = linear.matmul(x, weight)
        for rows in ([7], [200], list(range(299, 199, -1)), list(range(64))):
            assert torch.equal(linear.matmul(x[rows], weight), whole[rows])


def test_mixed_dtypes_raise() -> None:
    with pytest.raises(ValueError, match=r"weight is torch\.float32"):
        linear.matmul(torch.zeros(2, 3).half(), torch.zeros(4, 3))
