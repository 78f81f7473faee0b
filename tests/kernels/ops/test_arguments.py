"""How a wrapper refuses."""

from __future__ import annotations

import pytest
import torch

from multilora_kernels.ops.arguments import NotDifferentiable, check, refuse_gradients


def test_only_what_autograd_would_record_is_refused() -> None:
    leaf = torch.zeros(2, 3, requires_grad=True)
    with pytest.raises(NotDifferentiable, match=r"a \[2, 3\] argument requires grad"):
        refuse_gradients(torch.zeros(1), None, leaf)
    refuse_gradients(torch.zeros(1), None, leaf.detach())
    with torch.no_grad():
        refuse_gradients(leaf)
    with torch.inference_mode():
        refuse_gradients(leaf)


def test_a_condition_that_does_not_hold_is_a_value_error() -> None:
    check(True, "fine")
    with pytest.raises(ValueError, match="rows differ"):
        check(False, "rows differ")
