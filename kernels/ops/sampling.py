"""What is done with logits: masks, log probabilities, random tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from ..cpu import sampling as cpu
from ..cuda import dispatch as cuda
from ..library import register
from .arguments import check, refuse_gradients


def apply_token_mask_(
    logits: Tensor,  # [rows, vocab], changed in place
    mask: Tensor,  # int32 [rows, ceil(vocab / 32)], bit i of word j is token 32 * j + i
) -> None:
    """Sets logits to -inf where the mask has bit 0.

    ValueError for a mask of another shape or dtype.
    """
    refuse_gradients(logits)
    check(mask.dtype == torch.int32, "mask must be int32")
    check(
        mask.shape == (len(logits), -(-logits.shape[1] // 32)),
        "mask must be [rows, ceil(vocab / 32)]",
    )
    _MASK(logits, mask)


def top_logprobs(
    logits: Tensor,  # [rows, vocab]
    targets: Tensor,  # int64 [rows]
    top: int,
) -> tuple[Tensor, Tensor, Tensor]:  # int64 ids, fp32 logprobs, int64 ranks, each [rows, 1 + top]
    """Of each row the target and the `top` likeliest tokens, with log probabilities and ranks.

    A rank is 1 + the number of larger logits; of equal ones the lowest ids come first. `top` is cut
    to the vocabulary. A row's bits are its own. ValueError for shapes that disagree and a negative
    `top`; on CPU IndexError for a target out of the vocabulary.
    """
    refuse_gradients(logits)
    check(logits.dim() == 2 and targets.shape == logits.shape[:1], "targets must be [rows]")
    check(top >= 0, f"top must not be negative, but is {top}")
    found: tuple[Tensor, Tensor, Tensor] = _TOP(logits, targets, min(top, logits.shape[1]))
    return found


def draw(
    logits: Tensor,  # [rows, vocab]
    temperature: Tensor,  # fp32 [rows], above 0
    top_k: Tensor,  # int64 [rows], at least 1; from vocab on it keeps all
    top_p: Tensor,  # fp64 [rows], above 0; 1 keeps all
    log_min_p: Tensor,  # fp64 [rows], at most 0; -inf keeps all
    numbers: Tensor,  # int64 [rows] in [0, 2**53), uniform: which token it is
) -> tuple[Tensor, Tensor]:  # int64 [rows] tokens, bool [rows] failed
    """A random token for each row: the inverse of its cumulative probability, likeliest first.

    A row with NaN or +inf, or without anything finite, fails and has token 0. A row's token is its
    own. ValueError for shapes that disagree; the ranges beside the arguments are the
    caller's to keep.
    """
    each = (temperature, top_k, top_p, log_min_p, numbers)
    refuse_gradients(logits, *each)
    check(logits.dim() == 2 and logits.shape[1] > 0, "logits must be [rows, vocab]")
    check(
        all(t.shape == logits.shape[:1] for t in each),
        "temperature, top_k, top_p, log_min_p and numbers must be [rows]",
    )
    found: tuple[Tensor, Tensor] = _DRAW(logits, *each)
    return found


def _ranked(logits: Tensor, targets: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
    ids = logits.new_empty((len(logits), 1 + top), dtype=torch.int64)
    return ids, torch.empty_like(ids, dtype=torch.float32), torch.empty_like(ids)


def _drawn(logits: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
    rows = len(logits)
    return logits.new_empty(rows, dtype=torch.int64), logits.new_empty(rows, dtype=torch.bool)


_MASK = register(
    "apply_token_mask_(Tensor(a!) logits, Tensor mask) -> ()",
    cpu=cpu.apply_token_mask_,
    cuda=cuda.apply_token_mask_,
)
_TOP = register(
    "top_logprobs(Tensor logits, Tensor targets, int top) -> (Tensor, Tensor, Tensor)",
    cpu=cpu.top_logprobs,
    cuda=cuda.top_logprobs,
    meta=_ranked,
)
_DRAW = register(
    "draw(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor log_min_p, "
    "Tensor numbers) -> (Tensor, Tensor)",
    cpu=cpu.draw,
    cuda=cuda.draw,
    meta=_drawn,
)
