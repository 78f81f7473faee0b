"""What all places that adapters are fetched from have in common."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import BinaryIO, Protocol

READ_SECONDS = 10.0  # without a byte, until a connection is given up
FETCH_SECONDS = 600.0  # for one adapter, all attempts together


class Interrupted(Exception):
    """A fetch broke off in a way that another attempt may cure."""


class TooLong(Exception):
    """A file has more bytes than it may."""


class Remote(Protocol):
    """A folder that lies elsewhere."""

    def version(self) -> str | None:
        """Names what lies there now; None where the place cannot tell."""
        ...

    def fetch(self, name: str, file: BinaryIO, max_bytes: int, until: float) -> bool:
        """Writes the content of a file there to `file`; False when there is none of that name.

        `until` is a time of time.monotonic. Raises Interrupted, TooLong, or AdapterInvalid.
        """
        ...


def write_all(
    pieces: Iterable[bytes], file: BinaryIO, name: str, max_bytes: int, until: float
) -> int:
    """Writes the pieces and counts their bytes, within the bounds of size and time."""
    count = 0
    for piece in pieces:
        count += len(piece)
        if count > max_bytes:
            raise TooLong(f"{name} has more than {max_bytes} bytes")
        if time.monotonic() > until:
            raise Interrupted(f"{name} took longer than {FETCH_SECONDS:g} s")
        file.write(piece)
    return count
