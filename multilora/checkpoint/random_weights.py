"""Random weights of a model's shape, to measure speed without a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from .parts import Part


def load_random(parts: Iterable[Part], seed: int, dtype: torch.dtype, device: torch.device) -> None:
    """Loads every part of a model: deviation 1 / sqrt(inputs), norms 1, biases 0."""
    generator = torch.Generator(device).manual_seed(seed)

    def weight(name: str, shape: tuple[int, ...]) -> Tensor:
        if len(shape) == 1:
            return torch.full(shape, float(not name.endswith(".bias")), dtype=dtype, device=device)
        found = torch.empty(shape, dtype=dtype, device=device)
        return found.normal_(0, 1 / math.sqrt(shape[1]), generator=generator)

    parts = list(parts)
    shapes = dict(item for part in parts for item in part.shapes.items())
    with torch.no_grad():
        for part in parts:
            part.load(lambda name: weight(name, shapes[name]))
