"""How a checkpoint stretches its rotary embedding, in transformers' names."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, shown

if TYPE_CHECKING:
    from collections.abc import Mapping

TYPES = ("default", "linear", "dynamic", "yarn", "llama3")


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """A rule for frequencies, and what it needs; the defaults are transformers'."""

    rope_type: str = "llama3"  # "linear", "yarn" or "llama3"
    factor: float
    original_max_position_embeddings: int | None = None  # "yarn", "llama3"
    low_freq_factor: float = 1.0  # "llama3"
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0  # "yarn"
    beta_slow: float = 1.0
    attention_factor: float = 1.0  # of cos and sin
    truncate: bool = True


def read_rope_scaling(rope: Mapping[str, Any], max_positions: int) -> RopeScaling | None:
    """From `rope_scaling` or `rope_parameters` of a config.json; None for plain frequencies.

    "dynamic" changes them only beyond `max_position_embeddings`, to which it is therefore served:
    there keys of early tokens would depend on when they were asked for.
    """
    if number(rope, "partial_rotary_factor", 1.0) != 1.0:
        raise CheckpointError("partial_rotary_factor is not supported for Llama")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind in ("default", "dynamic"):
        return None
    if kind == "linear":
        return RopeScaling(rope_type=kind, factor=number(rope, "factor"))
    if kind == "yarn":
        return _yarn(rope, max_positions)
    if kind != "llama3":
        known = ", ".join(TYPES)
        raise CheckpointError(f"rope_type {shown(kind)} is not supported; supported: {known}")
    low, high = number(rope, "low_freq_factor"), number(rope, "high_freq_factor")
    if low >= high:
        raise CheckpointError(
            f"rope_scaling: low_freq_factor {low} must be below high_freq_factor {high}"
        )
    return RopeScaling(
        factor=number(rope, "factor"),
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_position_embeddings=size(rope, "original_max_position_embeddings"),
    )


def _yarn(rope: Mapping[str, Any], max_positions: int) -> RopeScaling:
    original = size(rope, "original_max_position_embeddings", max_positions)
    factor = number(rope, "factor", max_positions / original)
    if rope.get("attention_factor") is not None:
        attention = number(rope, "attention_factor")
    elif rope.get("mscale") and rope.get("mscale_all_dim"):
        scales = (number(rope, "mscale"), number(rope, "mscale_all_dim"))
        attention = _magnitude(factor, scales[0]) / _magnitude(factor, scales[1])
    else:
        attention = _magnitude(factor, 1.0)
    return RopeScaling(
        rope_type="yarn",
        factor=factor,
        original_max_position_embeddings=original,
        beta_fast=number(rope, "beta_fast", 32.0),
        beta_slow=number(rope, "beta_slow", 1.0),
        attention_factor=attention,
        truncate=bool(rope.get("truncate", True)),
    )


def _magnitude(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def need(raw: Mapping[str, Any], key: str) -> Any:
    """A value that must be there."""
    if raw.get(key) is None:
        raise CheckpointError(f"model config: {key} is missing")
    return raw[key]


def size(raw: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A positive integer of 31 bits."""
    value = need(raw, key) if default is None or raw.get(key) is not None else default
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
        raise CheckpointError(
            f"model config: {key} must be a positive integer below 2**31, not {shown(value)}"
        )
    return value


def number(raw: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """A positive number that a float holds."""
    value = need(raw, key) if default is None or raw.get(key) is not None else default
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < value < 1e300:
        raise CheckpointError(f"model config: {key} must be a positive number, not {shown(value)}")
    return float(value)
