"""A mix: the adapters of one request with their weights, and the identity of both."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

AdapterSpec = str | Mapping[str, float] | None
"""What a request may say: an adapter's name, names with weights, or None for the base."""

Mix = tuple[tuple[str, float], ...]
"""(adapter digest, weight) pairs sorted by digest; empty = the base."""


def mix_identity(mix: Mix) -> bytes:
    """SHA-256 of the list of digests and weights: 32 bytes, equal for equal mixes alone."""
    return hashlib.sha256(json.dumps([[d, w.hex()] for d, w in mix]).encode()).digest()
