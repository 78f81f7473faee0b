"""Rotary embedding: its frequencies, and cos and sin of every position."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..config.model import ModelConfig
from ..config.rope import RopeScaling


class Rope:
    """cos and sin of every position seen so far, float32 [positions, head_dim / 2] each.

    Grows by whole steps computed in one shape, so that a position's bits never depend on when it
    was asked for; on the CPU, so that they do not depend on the device either.
    """

    STEP = 4096

    def __init__(self, config: ModelConfig, device: torch.device | str = "cpu") -> None:
        self.inv_freq = inverse_frequencies(config)
        scaling = config.rope_scaling
        self._factor = 1.0 if scaling is None else scaling.attention_factor
        # Both at once: an exception between the two must not leave one longer than the other.
        none = torch.empty(0, config.head_dim // 2, dtype=torch.float32, device=device)
        self._tables = none, none

    def tables(self, length: int) -> tuple[Tensor, Tensor]:
        """cos and sin that cover at least `length` positions."""
        cos, sin = self._tables
        if len(cos) < length:
            steps = [
                torch.arange(first, first + self.STEP, device="cpu").float()[:, None]
                * self.inv_freq
                for first in range(len(cos), length, self.STEP)
            ]
            self._tables = (
                torch.cat((cos, *((a.cos() * self._factor).to(cos.device) for a in steps))),
                torch.cat((sin, *((a.sin() * self._factor).to(sin.device) for a in steps))),
            )
        return self._tables


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """fp32 [head_dim / 2], radians by position."""
    even = torch.arange(0, config.head_dim, 2, dtype=torch.int64, device="cpu")
    inv_freq = 1.0 / config.rope_theta ** (even.float() / config.head_dim)
    scaling = config.rope_scaling
    if scaling is None:
        return inv_freq
    if scaling.rope_type == "linear":
        return inv_freq / scaling.factor
    if scaling.rope_type == "yarn":
        return _yarn(inv_freq, scaling, config)
    return _llama3(inv_freq, scaling)


def _llama3(inv_freq: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama 3.1's rule: stretches long waves by `factor`, keeps short ones, blends between."""
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    original = scaling.original_max_position_embeddings
    assert original is not None
    turns = original * inv_freq / (2 * math.pi)  # over the original context
    blend = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - blend) * inv_freq / scaling.factor + blend * inv_freq


def _yarn(inv_freq: Tensor, scaling: RopeScaling, config: ModelConfig) -> Tensor:
    """YaRN (arXiv 2309.00071): keeps what turns often over the original context, ramps by index."""
    original, dim = scaling.original_max_position_embeddings, config.head_dim
    assert original is not None

    def index_of(turns: float) -> float:
        """The place of the frequency that turns so often."""
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low, high = index_of(scaling.beta_fast), index_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low if high != low else 0.001
    stretch = ((torch.arange(dim // 2, dtype=torch.float32) - low) / width).clamp(0.0, 1.0)
    return inv_freq / scaling.factor * stretch + inv_freq * (1 - stretch)
