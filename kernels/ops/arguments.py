"""How a wrapper refuses arguments."""

from __future__ import annotations

import torch
from torch import Tensor


class NotDifferentiable(RuntimeError):
    """An op was called where its gradient would be wanted; there is none."""


def refuse_gradients(*tensors: Tensor | None) -> None:
    """NotDifferentiable if autograd would record the call."""
    if not torch.is_grad_enabled():
        return
    for tensor in tensors:
        if tensor is not None and tensor.requires_grad:
            raise NotDifferentiable(
                f"a {list(tensor.shape)} argument requires grad, but the ops of multilora have no "
                "gradients: call them under torch.inference_mode() or torch.no_grad(), or detach() "
                "the argument"
            )


def check(condition: bool, text: str) -> None:
    """ValueError with `text` unless the condition holds."""
    if not condition:
        raise ValueError(text)
