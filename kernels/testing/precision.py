"""How near to `reference` in float64 the result of an op must be."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..tiles import Table

TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2.5e-2}
"""|found - expected| <= tolerance * (1 + |expected|), for values of order one."""


def to_float64(*values: Any) -> list[Any]:
    """The values with floating tensors cast to float64, those inside a table included."""
    wide: list[Any] = []
    for value in values:
        if isinstance(value, Table):
            value = Table(*to_float64(*value))
        elif isinstance(value, Tensor) and value.is_floating_point():
            value = value.double()
        wide.append(value)
    return wide


def assert_close(found: Tensor, expected: Tensor) -> None:
    """Within the tolerance of `found`'s type."""
    tolerance = TOLERANCE[found.dtype]
    torch.testing.assert_close(found.double(), expected.double(), rtol=tolerance, atol=tolerance)
