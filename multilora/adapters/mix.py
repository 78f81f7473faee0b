"""A mix: the adapters of one request with their weights, and the identity of both."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

from ..errors import RequestError

MAX_WEIGHT = (2 - 2**-23) * 2.0**127  # of fp32, the table's dtype

AdapterSpec = str | Mapping[str, float] | None
"""What a request may say: an adapter's name, names with weights, or None for the base."""

Mix = tuple[tuple[str, float], ...]
"""(adapter digest, weight) pairs sorted by digest; empty = the base."""


def mix_identity(mix: Mix) -> bytes:
    """SHA-256 of the list of digests and weights: 32 bytes, equal for equal mixes alone."""
    return hashlib.sha256(json.dumps([[d, w.hex()] for d, w in mix]).encode()).digest()


def check_weight(name: str, weight: object) -> None:
    """RequestError for what is no weight of an adapter in a mix."""
    if (
        not isinstance(weight, (int, float))
        or isinstance(weight, bool)
        or not -MAX_WEIGHT <= weight <= MAX_WEIGHT  # NaN too
    ):
        raise RequestError(f"weight of adapter {name[:140]!r} must be a finite number (in fp32)")
