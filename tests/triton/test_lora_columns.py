"""The kernel of trained columns in the interpreter, under the guard, against `reference`."""

from __future__ import annotations

import pytest
import torch

from multilora_kernels import reference
from multilora_kernels.cuda import lora_columns
from multilora_kernels.testing.guard import guarded
from multilora_kernels.testing.precision import assert_close, to_float64
from tests.harness.kernel_calls.dtypes import by_dtype
from tests.harness.kernel_calls.lora import POPULARITY, make_columns_call


@by_dtype
@pytest.mark.parametrize("popularity", ["distinct", "skewed", "half base", "all base", "empty"])
def test_lora_columns_adds_to_the_slots_columns_alone(popularity: str, dtype: torch.dtype) -> None:
    slots = POPULARITY[popularity]
    call = make_columns_call(slots, dtype, size=len(slots) + 1, in_=72)
    wide = to_float64(*call)
    with guarded(order=1):
        lora_columns.lora_columns_(*call)
    reference.lora_columns_(*wide)
    assert_close(call.y, wide[0])


def test_weights_of_another_dtype() -> None:
    call = make_columns_call([0, 2, 2], torch.bfloat16, weights_dtype=torch.float32)
    wide = to_float64(*call)
    with guarded(order=2):
        lora_columns.lora_columns_(*call)
    reference.lora_columns_(*wide)
    assert_close(call.y, wide[0])


def test_rows_that_are_not_contiguous_are_refused() -> None:
    y, x, changes, tiles = make_columns_call([0, 2])
    with pytest.raises(ValueError, match="contiguous"):
        lora_columns.lora_columns_(y.T.contiguous().T, x, changes, tiles)
