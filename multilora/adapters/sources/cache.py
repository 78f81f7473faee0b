"""Folders that were fetched, by the SHA-256 of their content: written whole, verified when used.

    contents/<content>/          the files of an adapter
    sources/<sha256 of it>.json  which content a source had last, and its version
    temporary/                   what is being fetched or removed

Several processes may share one. Who uses a folder holds a shared lock on it, and a folder goes only
when its lock can be had alone; the system ends the locks of a process that ends.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from ...errors import ConfigError

PIECE = 1 << 20
MAX_NOTE = 1 << 16


@dataclass(frozen=True, slots=True)
class CachedSource:
    """What a source had when it was fetched last."""

    source: str
    content: str
    version: str | None


@dataclass(frozen=True, slots=True)
class CachedFolder:
    """A folder of the cache."""

    content: str
    num_bytes: int
    used: float  # when last, in seconds since 1970


def default_root() -> Path:
    """Where the cache of this user is, unless it is said otherwise.

    ConfigError for a user without a home, as a container may have.
    """
    try:
        root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError as error:
        raise ConfigError(
            f"there is no place for a cache: {error}; set adapter_cache_dir to a folder"
        ) from error
    return Path(root) / "multilora/adapters"


class SourceCache:
    """The cache in a folder of this machine."""

    def __init__(self, root: Path, max_bytes: int | None = None) -> None:
        self.root, self.max_bytes = root, max_bytes
        self._contents, self._sources = root / "contents", root / "sources"
        self._temporary = root / "temporary"

    def path(self, content: str) -> Path:
        """Where the files of a content lie, if they do."""
        return self._contents / content

    # Looking up -------------------------------------------------------------------------------

    def known(self, source: str) -> CachedSource | None:
        """What is noted of a source whose folder is still there."""
        found = _read_note(self._note(source))
        is_there = found is not None and (self._contents / found.content).is_dir()
        return found if is_there and found is not None and found.source == source else None

    @contextmanager
    def opened(self, content: str) -> Iterator[Path | None]:
        """A folder, which stays while it is open; None when it is gone, or not what it was."""
        path = self._contents / content
        is_damaged = False
        with _locked(path, fcntl.LOCK_SH) as is_there:
            is_damaged = is_there and content_of(path) != content
            if is_there and not is_damaged:
                os.utime(path)
                yield path
                return
        if is_damaged:
            self._remove(path)
        yield None

    def folders(self) -> list[CachedFolder]:
        """All of them, the one that was not used for longest first."""
        found = []
        for path in self._contents.glob("*"):
            with suppress(FileNotFoundError):  # another process removes it
                size = sum(file.stat().st_size for file in path.iterdir())
                found.append(CachedFolder(path.name, size, path.stat().st_mtime))
        return sorted(found, key=lambda folder: (folder.used, folder.content))

    def sources(self) -> list[CachedSource]:
        """Those whose folders are there, sorted."""
        notes = (_read_note(path) for path in self._sources.glob("*.json"))
        found = [note for note in notes if note and (self._contents / note.content).is_dir()]
        return sorted(found, key=lambda note: note.source)

    # Changing ---------------------------------------------------------------------------------

    @contextmanager
    def temporary(self) -> Iterator[Path]:
        """An empty folder to fetch into, which is removed in the end."""
        for folder in (self._contents, self._sources, self._temporary):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        is_ours = False
        while not is_ours:  # or another process has cleaned up before the lock
            path = Path(tempfile.mkdtemp(dir=self._temporary))
            with _locked(path, fcntl.LOCK_SH) as is_ours:
                try:
                    if is_ours:
                        yield path
                finally:
                    shutil.rmtree(path, ignore_errors=True)

    def publish(self, folder: Path, source: str, version: str | None) -> str:
        """Makes a temporary folder one of the cache, and notes its source; returns its content."""
        content, size = content_of(folder), sum(f.stat().st_size for f in folder.iterdir())
        for file in (*folder.iterdir(), folder):
            _sync(file)
        if self.max_bytes is not None:
            self.make_room(self.max_bytes - size)
        with suppress(OSError):  # another process was first, with the same
            folder.rename(self._contents / content)
        _sync(self._contents)
        with self.temporary() as other:
            note = other / "note"
            note.write_text(json.dumps(asdict(CachedSource(source, content, version))))
            _sync(note)
            note.replace(self._note(source))
        _sync(self._sources)
        return content

    def make_room(self, max_bytes: int) -> int:
        """Removes what was not used for longest and is not in use; returns the bytes that remain.

        Also what a process that was killed has left.
        """
        for path in self._temporary.glob("*"):
            self._remove(path)
        folders = self.folders()
        total = sum(folder.num_bytes for folder in folders)
        for folder in folders:
            if total <= max_bytes:
                break
            if self._remove(self._contents / folder.content):
                total -= folder.num_bytes
        for path in self._sources.glob("*.json"):
            note = _read_note(path)
            if note is None or not (self._contents / note.content).is_dir():
                path.unlink(missing_ok=True)
        return total

    def _remove(self, path: Path) -> bool:
        """Whether it is gone: not while anybody uses it."""
        with _locked(path, fcntl.LOCK_EX | fcntl.LOCK_NB) as is_ours:
            if is_ours:
                gone = path.with_name(f".{path.name}.gone")
                if path.parent != self._temporary:
                    gone = self._temporary / gone.name
                    self._temporary.mkdir(mode=0o700, parents=True, exist_ok=True)
                path.rename(gone)  # at once: nobody sees half of it
                shutil.rmtree(gone, ignore_errors=True)
            return is_ours

    def _note(self, source: str) -> Path:
        return self._sources / f"{hashlib.sha256(source.encode()).hexdigest()}.json"


def content_of(folder: Path) -> str:
    """SHA-256 of the names and contents of the files in a folder; "" if it has anything else."""
    lines = []
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if not entry.is_file(follow_symlinks=False):
            return ""
        hash_ = hashlib.sha256()
        with open(entry.path, "rb") as file:
            while piece := file.read(PIECE):
                hash_.update(piece)
        lines.append([entry.name, hash_.hexdigest()])
    return hashlib.sha256(json.dumps(lines).encode()).hexdigest()


@contextmanager
def _locked(folder: Path, how: int) -> Iterator[bool]:
    """Locks a folder; False if it is not there, or with LOCK_NB is another's."""
    try:
        number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except (FileNotFoundError, NotADirectoryError):
        yield False
        return
    try:
        try:
            fcntl.flock(number, how)
            is_same = os.path.samestat(os.fstat(number), os.stat(folder))
        except (BlockingIOError, FileNotFoundError):
            is_same = False
        yield is_same
    finally:
        os.close(number)


def _read_note(path: Path) -> CachedSource | None:
    """None for a note that is not there, or that nothing of ours has written."""
    try:
        with open(path, "rb") as file:
            return CachedSource(**json.loads(file.read(MAX_NOTE)))
    except (OSError, ValueError, TypeError):
        return None


def _sync(path: Path) -> None:
    """Has the disk hold what was written."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
