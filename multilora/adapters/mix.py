"""A mix: the adapters of one request with their weights, and the identity of both."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping

from ..errors import AdapterError, AdapterNotFound, RequestError, shown

VERSION = re.compile(r"[0-9a-f]{6,64}")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}")

MAX_WEIGHT = (2 - 2**-23) * 2.0**127  # of fp32, the table's dtype

AdapterSpec = str | Mapping[str, float] | None
"""What a request may say: an adapter's name, names with weights, or None for the base.

A name may ask for a version: job@3fa9c1.
"""

Mix = tuple[tuple[str, float], ...]
"""(adapter digest, weight) pairs sorted by digest; empty = the base."""


def mix_identity(mix: Mix) -> bytes:
    """SHA-256 of the list of digests and weights: 32 bytes, equal for equal mixes alone."""
    return hashlib.sha256(json.dumps([[d, w.hex()] for d, w in mix]).encode()).digest()


BASE_IDENTITY = mix_identity(())


def weights_of(adapter: AdapterSpec) -> dict[str, float]:
    """Names with weights, as a request means them; a RequestError for what is neither."""
    if adapter is None:
        return {}
    if isinstance(adapter, str):
        return {adapter: 1.0}
    if not isinstance(adapter, Mapping):
        raise RequestError(
            f"adapter must be a name, names with weights, or None, not {shown(adapter)}"
        )
    for name, weight in adapter.items():
        if not isinstance(name, str):
            raise RequestError(f"an adapter name must be a string, not {type(name).__name__}")
        check_weight(name, weight)
    return {name: float(weight) for name, weight in adapter.items()}


def names_of(adapter: AdapterSpec) -> list[str]:
    """The names in what a request says, without the versions behind an @; each once."""
    return list(dict.fromkeys(name.partition("@")[0] for name in weights_of(adapter)))


def check_version(name: str, digest: str) -> None:
    """AdapterNotFound where `name` asks for a version, as in job@3fa9c1, and this is another."""
    plain, at, version = name.partition("@")
    if at and not VERSION.fullmatch(version):
        raise AdapterNotFound(
            f"{shown(version)} is no version of {plain!r}; give 6 to 64 digits of its digest"
        )
    if not digest.startswith(version):
        raise AdapterNotFound(f"adapter {plain!r} is at {digest} now, and not at {version}")


def check_weight(name: str, weight: object) -> None:
    """RequestError for what is no weight of an adapter in a mix."""
    if (
        not isinstance(weight, (int, float))
        or isinstance(weight, bool)
        or not -MAX_WEIGHT <= weight <= MAX_WEIGHT  # NaN too
    ):
        raise RequestError(f"weight of adapter {name[:140]!r} must be a finite number (in fp32)")


def check_name(name: object) -> None:
    """AdapterError for what no adapter may be called."""
    if not isinstance(name, str) or not NAME.fullmatch(name) or ".." in name:
        shown = repr(name[:140]) if isinstance(name, str) else f"of type {type(name).__name__}"
        raise AdapterError(
            f"adapter name {shown} is not allowed; use 1 to 128 letters, digits "
            "and ._:/- with a letter or digit first and no '..'"
        )
