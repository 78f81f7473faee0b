"""Token masks in the interpreter, under the guard, against `reference`."""

from __future__ import annotations

import pytest
import torch

from multilora_kernels import reference
from multilora_kernels.cuda import sampling
from multilora_kernels.testing.guard import guarded

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


@pytest.mark.parametrize("vocab", [1, 32, 47, 2100])
@dtypes
def test_apply_token_mask(dtype: torch.dtype, vocab: int) -> None:
    logits = torch.full((3, vocab + 8), torch.nan, dtype=dtype)[:, :vocab]
    logits.copy_(torch.randn(3, vocab))
    mask = torch.randint(-(2**31), 2**31, (3, -(-vocab // 32))).int()
    mask[0], mask[1] = -1, 0
    want = logits.clone()
    reference.apply_token_mask_(want, mask)
    with guarded(order=1):
        sampling.apply_token_mask_(logits, mask)
    assert torch.equal(logits, want)


def test_columns_must_be_contiguous() -> None:
    with pytest.raises(ValueError, match="contiguous"):
        sampling.apply_token_mask_(torch.zeros(64, 2).t(), torch.zeros(2, 2, dtype=torch.int32))
