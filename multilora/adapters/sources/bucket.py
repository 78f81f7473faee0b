"""Folders of S3 and Google Cloud Storage, by fsspec's s3fs and gcsfs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, BinaryIO

from ...errors import AdapterInvalid
from . import remote
from .address import Address
from .remote import Interrupted, TooLong, write_all

PIECE = 16 << 20  # a request each
TAGS = ("ETag", "etag", "LastModified", "updated", "generation", "size")


class Bucket:
    """A folder of a bucket; credentials and endpoints are those of the cloud's own settings."""

    def __init__(self, address: Address, names: tuple[str, ...]) -> None:
        self._place, self._scheme, self._names = address.place, address.scheme, names
        self._opened: Any = None

    @property
    def _files(self) -> Any:
        if self._opened is None:
            import fsspec

            self._opened = fsspec.filesystem(self._scheme, **_settings(self._scheme))
        return self._opened

    def version(self) -> str:
        """What the bucket tells of the files of these names."""
        found = {name: self._info(name) for name in self._names}
        return json.dumps(found, default=str, sort_keys=True)

    def _info(self, name: str) -> dict[str, Any] | None:
        try:
            self._files.invalidate_cache()
            info = self._files.info(f"{self._place}/{name}")
        except FileNotFoundError:
            return None
        except Exception as error:
            raise _as_ours(error, name) from error
        return {tag: info[tag] for tag in TAGS if tag in info}

    def fetch(self, name: str, file: BinaryIO, max_bytes: int, until: float) -> bool:
        """As `Remote.fetch`."""
        info = self._info(name)
        if info is None:
            return False
        if info["size"] > max_bytes:
            raise TooLong(f"{name} has {info['size']} bytes, more than {max_bytes}")
        count = write_all(self._pieces(name), file, name, max_bytes, until)
        if count != info["size"] or self._info(name) != info:
            raise Interrupted(f"{name} changed while it was fetched")
        return True

    def _pieces(self, name: str) -> Iterator[bytes]:
        try:
            with self._files.open(f"{self._place}/{name}", "rb", cache_type="none") as there:
                while piece := there.read(PIECE):
                    yield piece
        except Exception as error:
            raise _as_ours(error, name) from error


def _settings(scheme: str) -> dict[str, Any]:
    """Bounds of time. Attempts are counted by who calls."""
    if scheme == "gs":
        return {"requests_timeout": 6 * remote.READ_SECONDS}  # for a piece as a whole
    times = {"connect_timeout": remote.READ_SECONDS, "read_timeout": remote.READ_SECONDS}
    return {"config_kwargs": {**times, "retries": {"total_max_attempts": 1}}}


def _as_ours(error: Exception, name: str) -> Exception:
    why = f"{name}: {error or type(error).__name__}"
    return AdapterInvalid(why) if isinstance(error, PermissionError) else Interrupted(why)
