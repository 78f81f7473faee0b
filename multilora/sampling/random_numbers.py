"""Random numbers that depend on a request's seed and the position alone: splitmix64."""

from __future__ import annotations

import numpy as np

from multilora_kernels.reference import DRAW_BITS

_GAMMA = 0x9E3779B97F4A7C15  # splitmix64's increment, 2**64 / golden ratio


def random_stream(seed: int) -> np.uint64:
    """The stream of a seed, any integer."""
    # Mixed, so that streams of neighbouring seeds do not overlap.
    first = np.array([(seed + _GAMMA) % 2**64], np.uint64)
    found: np.uint64 = _mix(first)[0]
    return found


def random_numbers(
    streams: np.ndarray,  # uint64 [n]
    positions: np.ndarray,  # int64 [n]
) -> np.ndarray:  # int64 [n]
    """Uniform integers in [0, 2**53): of each stream the number at its position."""
    steps = (positions + 1).astype(np.uint64)
    mixed = _mix(streams + steps * np.uint64(_GAMMA))
    found: np.ndarray = (mixed >> np.uint64(64 - DRAW_BITS)).astype(np.int64)
    return found


def _mix(values: np.ndarray) -> np.ndarray:
    """splitmix64's finalizer: a bijection of 64 bits that spreads every bit over all."""
    values = (values ^ values >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ values >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    values = values ^ values >> np.uint64(31)
    return values
