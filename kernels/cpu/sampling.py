"""What is done with logits on CPU: in C++, and by the definitions where that cannot do it."""

from __future__ import annotations

from ctypes import byref

import torch
from torch import Tensor

from .. import index_checks, reference
from . import native


def apply_token_mask_(logits: Tensor, mask: Tensor) -> None:
    """See `reference.apply_token_mask_`."""
    code = native.DTYPE_CODES.get(logits.dtype)
    if native.LIB is None or code is None or logits.stride(-1) != 1 or mask.stride(-1) != 1:
        return reference.apply_token_mask_(logits, mask)
    args = native.MaskArgs(
        logits.data_ptr(), mask.data_ptr(), logits.stride(0), mask.stride(0), *logits.shape, code,
        torch.get_num_threads(),
    )  # fmt: skip
    native.LIB.apply_token_mask(byref(args))


def top_logprobs(logits: Tensor, targets: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.top_logprobs`: in C++ two passes over a row, in torch some ten."""
    code = native.DTYPE_CODES.get(logits.dtype)
    if (
        native.LIB is not None
        and code is not None
        and top <= native.MOST_TOP
        and logits.stride(1) == 1
        and targets.dtype == torch.int64
        and targets.is_contiguous()
    ):
        rows, vocab = logits.shape
        ids = torch.empty(rows, 1 + top, dtype=torch.int64)
        ranks, logprobs = torch.empty_like(ids), torch.empty_like(ids, dtype=torch.float32)
        args = native.TopArgs(
            logits.data_ptr(), targets.data_ptr(), ids.data_ptr(), logprobs.data_ptr(),
            ranks.data_ptr(), logits.stride(0), rows, vocab, top, code, torch.get_num_threads(),
        )  # fmt: skip
        index_checks.refuse(native.LIB.top_logprobs(byref(args)))
        return ids, logprobs, ranks
    index_checks.check_targets(targets, logits.shape[1])
    return reference.top_logprobs(logits, targets, top)


_DRAW_DTYPES = (torch.float32, torch.int64, torch.float64, torch.float64, torch.int64)


def draw(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    log_min_p: Tensor,
    numbers: Tensor,
) -> tuple[Tensor, Tensor]:
    """See `reference.draw`, which sorts; C++ does not."""
    each: tuple[Tensor, ...] = (temperature, top_k, top_p, log_min_p, numbers)
    if logits.dtype not in native.DTYPE_CODES:
        logits = logits.float()
    rows, vocab = logits.shape
    tokens, failed = torch.empty(rows, dtype=torch.int64), torch.empty(rows, dtype=torch.bool)
    if native.LIB is not None and logits.stride(1) == 1:
        each = tuple(t.to(dtype).contiguous() for t, dtype in zip(each, _DRAW_DTYPES, strict=True))
        args = native.DrawArgs(
            tokens.data_ptr(), failed.data_ptr(), logits.data_ptr(), *(t.data_ptr() for t in each),
            logits.stride(0), rows, vocab, native.DTYPE_CODES[logits.dtype],
            torch.get_num_threads(),
        )  # fmt: skip
        native.LIB.draw(byref(args))
        return tokens, failed
    for i in range(rows):  # softmax of many rows may round otherwise
        own = logits[i : i + 1].to(torch.float32, copy=True)
        tokens[i : i + 1], failed[i : i + 1] = reference.draw(own, *(t[i : i + 1] for t in each))
    return tokens, failed
