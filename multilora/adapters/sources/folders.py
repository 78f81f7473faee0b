"""A source becomes a local folder: itself, or what was fetched from it into the cache."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

from ...errors import (
    AdapterError,
    AdapterInvalid,
    AdapterTooLarge,
    AdapterUnavailable,
    shown,
)
from ..peft.config import MAX_CONFIG_BYTES
from ..peft.files import CONFIG_FILE
from ..peft.reader import WEIGHTS_FILE
from ..peft.weights import MAX_FILE_BYTES
from . import remote
from .address import Address, is_allowed, parse
from .bucket import Bucket
from .cache import SourceCache
from .hub import Hub
from .remote import Interrupted, Remote, TooLong
from .web import Web

logger = logging.getLogger(__name__)

ATTEMPTS = 3
FIRST_PAUSE = 0.5  # seconds between two attempts, then twice as long
NEEDED = {CONFIG_FILE: MAX_CONFIG_BYTES, WEIGHTS_FILE: MAX_FILE_BYTES}
TEMPLATES = {"tokenizer_config.json": 8 << 20, "chat_template.jinja": 8 << 20}  # if there are
FILES = NEEDED | TEMPLATES
"""What is fetched, each of so many bytes at most."""
EXTRAS = {
    "hf": ("hub", ("huggingface_hub",)),
    "s3": ("remote", ("fsspec", "s3fs")),
    "gs": ("remote", ("fsspec", "gcsfs")),
}


class SourceFolders:
    """The local folders of the sources that one engine, or a command, may use."""

    def __init__(self, allowed: Sequence[str], cache: SourceCache | None) -> None:
        """Without a cache nothing may be allowed."""
        assert cache is not None or not allowed
        self._allowed, self._given = tuple(allowed), cache

    @property
    def _cache(self) -> SourceCache:
        assert self._given is not None, "only what is allowed comes this far"
        return self._given

    def check(self, source: str | Path) -> Path | Address:
        """What the source means; AdapterInvalid where it may not be used or an extra is missing."""
        found = parse(source)
        if isinstance(found, Path):
            return found
        if not is_allowed(str(found), self._allowed):
            allowed = f"it allows {', '.join(self._allowed)}" if self._allowed else "it is empty"
            raise AdapterInvalid(
                f"adapters are not fetched from {shown(str(found))}: the setting adapter_sources "
                f"lists the prefixes of what is, and {allowed}"
            )
        extra, packages = EXTRAS.get(found.scheme, ("", ()))
        if missing := [name for name in packages if find_spec(name) is None]:
            raise AdapterInvalid(
                f"{found.scheme}:// needs {' and '.join(missing)}: pip install 'multilora[{extra}]'"
            )
        return found

    @contextmanager
    def folder(self, source: str | Path, *, is_pinned: bool = False) -> Iterator[Path]:
        """The folder of a source, which stays while it is open.

        What lies in the cache is used when it is what lies at the source now, or, of a commit of a
        hub and of a source that `is_pinned` (its digest is known), without asking.
        Raises AdapterInvalid, AdapterTooLarge, or AdapterUnavailable.
        """
        address = self.check(source)
        if isinstance(address, Path):
            yield address
            return
        for _ in range(ATTEMPTS):
            content = self._content(address, is_pinned)
            with self._cache.opened(content) as folder:
                if folder is not None:
                    yield folder
                    return
        raise AdapterUnavailable(
            f"{address} went from the cache {shown(str(self._cache.root))} while it was used; give "
            "adapter_cache_bytes more"
        )

    def _content(self, address: Address, is_pinned: bool) -> str:
        """The content in the cache, fetched if need be."""
        known = self._cache.known(str(address))
        if known is not None and (is_pinned or address.is_fixed):
            return known.content
        until = time.monotonic() + remote.FETCH_SECONDS
        for attempt in range(ATTEMPTS):
            try:
                end = self._remote(address)
                version = end.version()
                if known is not None and version is not None and version == known.version:
                    return known.content
                return self._fetch(address, end, version, until)
            except AdapterError as error:
                raise type(error)(f"{address}: {error}") from error
            except (Interrupted, OSError) as error:  # the place, or our own disk
                pause = FIRST_PAUSE * 2**attempt
                if attempt + 1 == ATTEMPTS or time.monotonic() + pause > until:
                    raise AdapterUnavailable(
                        f"{address} could not be fetched, in {attempt + 1} attempts: {error}"
                    ) from error
                logger.info("%s: %s; another attempt in %g s", address, error, pause)
                time.sleep(pause)
        raise AssertionError

    def _fetch(self, address: Address, end: Remote, version: str | None, until: float) -> str:
        most, total = self._cache.max_bytes, 0
        with self._cache.temporary() as folder:
            for name, limit in FILES.items():
                left = limit if most is None else min(limit, most - total)
                with open(folder / name, "w+b") as file:
                    try:
                        is_there = end.fetch(name, file, left, until)
                    except TooLong as error:
                        if left == limit:
                            raise AdapterInvalid(f"{error}, the limit of all adapters") from error
                        raise AdapterTooLarge(
                            f"{error}, all that is left of adapter_cache_bytes={most}; raise that"
                        ) from error
                    total += file.tell()
                if not is_there:
                    (folder / name).unlink()
                if name in NEEDED and not is_there:
                    raise AdapterInvalid(f"there is no {name}; give the folder that holds it")
            return self._cache.publish(folder, str(address), version)

    def _remote(self, address: Address) -> Remote:
        if address.scheme == "hf":
            return Hub(address)
        if address.scheme in ("s3", "gs"):
            return Bucket(address, tuple(FILES))
        return Web(str(address), tuple(FILES), self._may_go)

    def _may_go(self, url: str) -> bool:
        """Whether a web server may lead there."""
        parts = urlsplit(url)
        place = f"{parts.scheme}://{parts.netloc}{parts.path}"
        try:
            return isinstance(parse(place), Address) and is_allowed(place, self._allowed)
        except AdapterInvalid:
            return False
