"""What a source says: a local folder, or the address of a folder elsewhere, and which may be used.

An address is plain: no escapes, queries, users or steps upward, so that what is compared with the
allowed prefixes is what is fetched.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...config.engine import ADAPTER_SCHEMES
from ...errors import AdapterInvalid, shown

SEGMENT = re.compile(r"[A-Za-z0-9._~+=,@:-]{1,255}")
HOST = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]*(:[0-9]{1,5})?")
HUB = re.compile(r"(?P<repo>[^/@]+/[^/@]+)(@(?P<revision>[^/@]+))?(/(?P<folder>[^@]+))?")
COMMIT = re.compile(r"[0-9a-f]{40}")
MAX_LENGTH = 1000
FORMS = (
    "hf://org/name[@revision][/folder], s3://bucket/folder, gs://bucket/folder, https://host/folder"
)


@dataclass(frozen=True, slots=True)
class Address:
    """A folder that lies elsewhere."""

    scheme: str
    place: str  # what follows the ://, without a slash at its end

    def __str__(self) -> str:
        return f"{self.scheme}://{self.place}"

    @property
    def is_fixed(self) -> bool:
        """Whether what lies there can never change: a commit of a hub."""
        found = HUB.fullmatch(self.place) if self.scheme == "hf" else None
        return found is not None and COMMIT.fullmatch(found["revision"] or "") is not None


def parse(source: str | Path) -> Path | Address:
    """A local folder, or an address; AdapterInvalid for what is neither."""
    text = str(source)
    if isinstance(source, Path) or "://" not in text:
        return Path(source)
    scheme, _, place = text.partition("://")
    place = place.removesuffix("/")
    if scheme not in ADAPTER_SCHEMES:
        raise AdapterInvalid(f"{shown(text)} is no source of adapters; give a folder, {FORMS}")
    segments = place.split("/")
    if len(text) > MAX_LENGTH or not all(SEGMENT.fullmatch(s) and s.strip(".") for s in segments):
        raise AdapterInvalid(
            f"{shown(text)} is not allowed as a source: letters, digits and ._~+=,@:- between "
            "slashes, at most 1,000, without escapes, queries and '..'"
        )
    is_right = HOST.fullmatch(segments[0]) if scheme != "hf" else HUB.fullmatch(place)
    if is_right is None:
        raise AdapterInvalid(f"{shown(text)} is no source of adapters; one has the form {FORMS}")
    return Address(scheme, place)


def is_allowed(address: str, prefixes: Sequence[str]) -> bool:
    """Whether one of the prefixes ends where a part of the address does.

    So `hf://me` allows `hf://me/x` and not `hf://me-too/x`.
    """
    for prefix in prefixes:
        begin = prefix.rstrip("/")
        ends = ("/", "@") if prefix.startswith("hf://") else ("/",)
        if address == begin or address.startswith(tuple(begin + end for end in ends)):
            return True
    return False
