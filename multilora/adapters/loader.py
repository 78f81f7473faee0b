"""Adapters that are known by their source: read when a request names one, and dropped again.

Folders are read by a thread of its own, one after the other, in the order in which they were asked
for; what must be fetched has threads of its own, so that a slow server holds up nobody else. What
they bring is installed by the engine, between two steps, in whole or not at all.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ..errors import AdapterError, AdapterInvalid, AdapterNotFound, shown
from .packed_adapter import PackedAdapter
from .store import AdapterStore

logger = logging.getLogger(__name__)

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds from a failed load to the next attempt
NICENESS = 10  # of the reading threads: steps come first
FETCHES = 4  # at once
DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class AdapterSource:
    """Where an adapter is to be read from."""

    path: str | Path  # a folder, or an address such as hf://org/name
    digest: str | None = None  # that it must have; None = any
    pinned: bool = False  # stays in host memory once it is loaded, whatever the bound

    @property
    def is_remote(self) -> bool:
        """Whether it must be fetched."""
        return isinstance(self.path, str) and "://" in self.path


@dataclass(frozen=True, slots=True)
class RegisteredAdapter:
    """An adapter that is read when a request names it."""

    name: str
    path: str
    digest: str | None  # that it must have
    state: str  # "registered", "loading", "loaded" or "failed"
    pinned: bool = False  # stays in host memory once it is loaded


@dataclass(frozen=True, slots=True)
class RegistryChanges:
    """What a registry file changed."""

    registered: tuple[str, ...] = ()  # new names, and those that mean something else now
    removed: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class LoadedAdapter:
    """What reading a source gave."""

    digest: str
    host: PackedAdapter
    chat_template: str | None = None  # of its folder, if it is not the base's
    path: str | None = None  # of its folder, or its address; None = it lay in memory


class _Origin(NamedTuple):
    """Where an adapter came from, and what came with it."""

    path: str | None
    chat_template: str | None


@dataclass(slots=True)
class _Failure:
    """The last load of a name came to nothing."""

    error: AdapterError
    count: int  # in a row
    until: float  # when the next may be tried


class AdapterLoader:
    """The sources of one engine's adapters by name, and which of them are being read."""

    def __init__(
        self,
        store: AdapterStore,
        read: Callable[[str, AdapterSource], LoadedAdapter],  # by name, in a thread
        max_bytes: int | None,  # of host memory for all adapters; None = no bound
        resolver: Callable[[str], str | Path | None] | None = None,  # of names that nobody knows
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store, self._read, self._max_bytes = store, read, max_bytes
        self._resolver, self._clock = resolver, clock
        self._sources: dict[str, AdapterSource] = {}
        self._synced: set[str] = set()  # the names that a registry file has brought
        self._loads: dict[str, tuple[AdapterSource, Future[LoadedAdapter]]] = {}
        self._failures: dict[str, _Failure] = {}
        self._origins: dict[str, _Origin] = {}  # by name, of what was read
        self._used: OrderedDict[str, None] = OrderedDict()  # names read here; next victim first
        self._pools: dict[bool, ThreadPoolExecutor] = {}  # of what is fetched, and what is not
        self.is_over = False  # the bound, as too much was in use when there was need of room
        self.num_loads = self.num_failures = self.num_evictions = 0
        self.num_hits = self.num_misses = 0

    @property
    def sources(self) -> dict[str, AdapterSource]:
        """The sources by name, sorted."""
        return dict(sorted(self._sources.items()))

    def infos(self) -> dict[str, RegisteredAdapter]:
        """What is known of each source by name, sorted."""
        return {
            name: RegisteredAdapter(
                name, str(source.path), source.digest, self.state(name), source.pinned
            )
            for name, source in self.sources.items()
        }

    def state(self, name: str) -> str:
        """Of a name that has a source: "loaded", "loading", "failed" or "registered"."""
        if self._store.has(name):
            return "loaded"
        if name in self._loads:
            return "loading"
        return "failed" if name in self._failures else "registered"

    def register(self, name: str, source: AdapterSource) -> None:
        """Makes the source what `name` means from now on."""
        self.forget(name)
        if self._store.has(name):
            self._store.unload(name)
        self._sources[name] = source

    def install(self, name: str, found: LoadedAdapter) -> None:
        """Makes `name` mean what was read, for good."""
        self.forget(name)
        self._enter(name, found)

    def _enter(self, name: str, found: LoadedAdapter) -> None:
        self._store.install(name, found.digest, found.host)
        self._origins[name] = _Origin(found.path, found.chat_template)

    def knows(self, name: str) -> bool:
        """Whether an adapter of this name is loaded, or has a source."""
        return name in self._sources or self._store.has(name)

    def path(self, name: str) -> str | None:
        """The folder or address that a name means; None if there is none."""
        if name in self._sources:
            return str(self._sources[name].path)
        return self._origins[name].path if name in self._origins else None

    def chat_template(self, name: str) -> str | AdapterSource | None:
        """The chat template of an adapter, the source to read it from, or None."""
        if name in self._origins:
            return self._origins[name].chat_template
        if name not in self._sources and not self._resolve(name):
            return None
        return self._sources[name]

    def sync(self, wanted: Mapping[str, AdapterSource]) -> RegistryChanges:
        """Makes these the names that a registry file has; others are left alone.

        May be raised out of anywhere and called again.
        """
        changed = [name for name, source in wanted.items() if self._sources.get(name) != source]
        gone = sorted(self._synced - wanted.keys())
        for name in changed:
            self.register(name, wanted[name])
        self._synced |= wanted.keys()
        for name in gone:
            if self._store.has(name):
                self._store.unload(name)
            self.forget(name)  # last: until then another call would do it
        return RegistryChanges(tuple(sorted(changed)), tuple(gone))

    def forget(self, name: str) -> bool:
        """Drops a name's source; what was read of it stays. False if there is none."""
        self._origins.pop(name, None)
        _, load = self._loads.pop(name, (None, None))
        if load is not None:
            load.cancel()
        self._failures.pop(name, None)
        self._used.pop(name, None)
        self._synced.discard(name)
        return self._sources.pop(name, None) is not None

    def missing(self, names: Iterable[str]) -> list[str]:
        """Those of the names that must be read first; they have a source.

        AdapterNotFound for a name without one, and why the last load of one failed, while it is
        too early to try again.
        """
        found = []
        for name in names:
            if self._store.has(name):
                if name in self._used:
                    self._used.move_to_end(name)
                continue
            if name not in self._sources and not self._resolve(name):
                self._store.resolve(name)  # says which there are
            self._check_failure(name)
            found.append(name)
        return found

    def _resolve(self, name: str) -> bool:
        """Asks the caller's resolver for a source of a name that has none."""
        if self._resolver is None:
            return False
        try:
            path = self._resolver(name)
        except Exception as error:
            raise AdapterNotFound(f"the resolver of {shown(name)} raised {shown(error)}") from error
        if path is None:
            return False
        if not isinstance(path, str | Path):
            raise AdapterNotFound(f"the resolver of {shown(name)} gave no path but {shown(path)}")
        self._sources[name] = AdapterSource(path)
        return True

    def _check_failure(self, name: str) -> None:
        failure = self._failures.get(name)
        left = 0.0 if failure is None else failure.until - self._clock()
        if failure is not None and left > 0:
            raise type(failure.error)(f"{failure.error}; it can be tried again in {left:.0f} s")

    def count(self, names: Collection[str], missing: Collection[str]) -> None:
        """Notes that a request came for these names, of which some were missing."""
        self.num_hits += sum(name in self._sources for name in names) - len(missing)
        self.num_misses += len(missing)

    def start(self, names: Iterable[str]) -> None:
        """Has these sources read, unless they are being."""
        for name in names:
            if name not in self._loads:
                source = self._sources[name]
                pool = self._pool(source.is_remote)
                self._loads[name] = source, pool.submit(self._load, name, source)

    def _pool(self, is_remote: bool) -> ThreadPoolExecutor:
        if is_remote not in self._pools:
            count, name = (FETCHES, "fetcher") if is_remote else (1, "loader")
            self._pools[is_remote] = ThreadPoolExecutor(
                count, f"multilora-{name}", initializer=be_nice
            )
        return self._pools[is_remote]

    def _load(self, name: str, source: AdapterSource) -> LoadedAdapter:
        """Within the thread. Raises nothing but AdapterError."""
        try:
            found = self._read(name, source)
        except AdapterError:
            raise
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
            raise AdapterInvalid(f"adapter {name!r} cannot be loaded: {why}"[:1000]) from error
        if source.digest is not None and found.digest != source.digest:
            raise AdapterInvalid(
                f"adapter {name!r} at {shown(str(source.path))} has the digest {found.digest}, and "
                f"was registered with {source.digest}; register it again if it was changed"
            )
        return found

    @property
    def has_news(self) -> bool:
        """Whether a load has come to its end."""
        return any(load.done() for _, load in self._loads.values())

    @property
    def is_busy(self) -> bool:
        """Whether anything is being read."""
        return bool(self._loads)

    def wait(self, seconds: float) -> None:
        """Until a load has come to its end, or for so long."""
        wait([load for _, load in self._loads.values()], seconds, "FIRST_COMPLETED")

    def take_in(self, wanted: Collection[str]) -> None:
        """Installs what has been read, and makes room for it, but not of what is wanted.

        May be raised out of anywhere and called again.
        """
        for name, (_, load) in list(self._loads.items()):
            if not load.done():
                continue
            if load.cancelled():
                del self._loads[name]
            elif (error := load.exception()) is not None:
                self._note_failure(name, error)
            else:
                found = load.result()
                self._used[name] = None
                self._enter(name, found)
                self._failures.pop(name, None)
                self.num_loads += 1
                del self._loads[name]
        self.make_room(wanted)

    def _note_failure(self, name: str, error: BaseException) -> None:
        assert isinstance(error, AdapterError)
        before = self._failures.get(name)
        count = 1 if before is None else before.count + 1
        pause = min(FIRST_PAUSE * 2 ** (count - 1), LONGEST_PAUSE)
        self._failures[name] = _Failure(error, count, self._clock() + pause)
        self.num_failures += 1
        del self._loads[name]
        logger.warning(
            "adapter %r was not loaded, and can be again in %g s: %s", name, pause, error
        )

    def make_room(self, wanted: Collection[str]) -> None:
        """Drops adapters that can be read again, those that were not used for longest first."""
        if self._max_bytes is None:
            return
        self.is_over = self._store.host_bytes > self._max_bytes
        for name in list(self._used):
            if not self.is_over:
                return
            if not self._store.has(name):  # unloaded by its user
                del self._used[name]
            elif (
                name not in wanted
                and not self._sources[name].pinned
                and not self._store.is_needed(name)
            ):
                self._store.unload(name)  # first, or an exception in between would keep it for ever
                del self._used[name]
                self.num_evictions += 1
                self.is_over = self._store.host_bytes > self._max_bytes

    def drop_unwanted(self, wanted: Collection[str]) -> None:
        """Cancels loads that have not begun and that nobody waits for."""
        for name, (_, load) in list(self._loads.items()):
            if name not in wanted and load.cancel():
                del self._loads[name]


def check_digest(digest: object) -> None:
    """AdapterInvalid for what is no digest; None is none."""
    if digest is not None and not (isinstance(digest, str) and DIGEST.fullmatch(digest)):
        raise AdapterInvalid(f"a digest is 64 hexadecimal digits, not {shown(digest)}")


def be_nice() -> None:
    """Lets the processor prefer the steps to this thread, and to those that it starts."""
    with contextlib.suppress(AttributeError, OSError):  # as far as the system has that
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
