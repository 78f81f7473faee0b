"""Token masks on CUDA; log probabilities and draws there are torch's own sorts: `reference`.

`apply_token_mask_`: `logits[row, token] = -inf` where bit `token % 32` of `mask[row, token // 32]`
is 0. Rows may have any stride, columns are contiguous. Logits are not read.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _apply_token_mask_kernel(
    logits_ptr,  # [rows, vocab], changed in place
    mask_ptr,  # int32 [rows, ceil(vocab / 32)]
    stride_logits_rows,
    stride_mask_rows,
    vocab,
    BLOCK: tl.constexpr,
):
    """logits[row, token] = -inf where bit token % 32 of mask[row, token // 32] is 0.

    Grid: (rows, blocks of BLOCK tokens). logits [rows, vocab], mask int32 [rows, ceil(vocab / 32)].
    """
    pid_row = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask_vocab = offs < vocab
    words = tl.load(mask_ptr + pid_row * stride_mask_rows + offs // 32, mask=mask_vocab, other=-1)
    forbidden = ((words >> (offs % 32)) & 1) == 0
    lowest = tl.full([BLOCK], float("-inf"), logits_ptr.dtype.element_ty)
    tl.store(logits_ptr + pid_row * stride_logits_rows + offs, lowest, mask=mask_vocab & forbidden)


def apply_token_mask_(logits: Tensor, mask: Tensor) -> None:
    """See `reference.apply_token_mask_`."""
    rows, vocab = logits.shape
    if logits.stride(1) != 1 or mask.stride(1) != 1:
        raise ValueError("logits and mask must be contiguous in their last dimension")
    if logits.numel():
        _apply_token_mask_kernel[(rows, triton.cdiv(vocab, 2048))](
            logits, mask, logits.stride(0), mask.stride(0), vocab,
            BLOCK=2048, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
