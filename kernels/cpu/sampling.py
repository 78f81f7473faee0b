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
        logits=logits.data_ptr(),
        mask=mask.data_ptr(),
        logits_stride=logits.stride(0),
        mask_stride=mask.stride(0),
        rows=len(logits),
        vocab=logits.shape[1],
        dtype=code,
        num_threads=torch.get_num_threads(),
    )
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
            logits=logits.data_ptr(),
            targets=targets.data_ptr(),
            ids=ids.data_ptr(),
            logprobs=logprobs.data_ptr(),
            ranks=ranks.data_ptr(),
            logits_stride=logits.stride(0),
            rows=rows,
            vocab=vocab,
            top=top,
            dtype=code,
            num_threads=torch.get_num_threads(),
        )
        index_checks.refuse(native.LIB.top_logprobs(byref(args)))
        return ids, logprobs, ranks
    index_checks.check_targets(targets, logits.shape[1])
    return reference.top_logprobs(logits, targets, top)


def draw(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    log_min_p: Tensor,
    numbers: Tensor,
) -> tuple[Tensor, Tensor]:
    """See `reference.draw`, which sorts; C++ does not."""
    if logits.dtype not in native.DTYPE_CODES:
        logits = logits.float()
    rows, vocab = logits.shape
    tokens, failed = torch.empty(rows, dtype=torch.int64), torch.empty(rows, dtype=torch.bool)
    if native.LIB is not None and logits.stride(1) == 1:
        temperature = temperature.to(torch.float32).contiguous()
        top_k, numbers = (t.to(torch.int64).contiguous() for t in (top_k, numbers))
        top_p, log_min_p = (t.to(torch.float64).contiguous() for t in (top_p, log_min_p))
        args = native.DrawArgs(
            tokens=tokens.data_ptr(),
            failed=failed.data_ptr(),
            logits=logits.data_ptr(),
            temperature=temperature.data_ptr(),
            top_k=top_k.data_ptr(),
            top_p=top_p.data_ptr(),
            log_min_p=log_min_p.data_ptr(),
            numbers=numbers.data_ptr(),
            logits_stride=logits.stride(0),
            rows=rows,
            vocab=vocab,
            dtype=native.DTYPE_CODES[logits.dtype],
            num_threads=torch.get_num_threads(),
        )
        native.LIB.draw(byref(args))
        return tokens, failed
    each = (temperature, top_k, top_p, log_min_p, numbers)
    for i in range(rows):  # softmax of many rows may round otherwise
        own = logits[i : i + 1].to(torch.float32, copy=True)
        tokens[i : i + 1], failed[i : i + 1] = reference.draw(own, *(t[i : i + 1] for t in each))
    return tokens, failed
