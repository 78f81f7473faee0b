"""Opening files that someone else wrote: only regular ones, of bounded size, in strict JSON."""

from __future__ import annotations

import json
import os
import stat
from collections import Counter
from itertools import islice
from typing import TYPE_CHECKING, Any, BinaryIO

from ...errors import AdapterInvalid, shown

if TYPE_CHECKING:
    from pathlib import Path


CONFIG_FILE = "adapter_config.json"
MAX_ENTRIES = 1000  # of a folder, which is looked through for one adapter


def adapter_folder(folder: Path) -> Path:
    """The folder that holds the adapter: this one, or the only one in it that does.

    PEFT saves an adapter of another name than "default" in a folder of that name. AdapterInvalid if
    there is none, or more than one.
    """
    if not os.path.isdir(folder):
        raise AdapterInvalid(f"there is no such folder; give the one that holds {CONFIG_FILE}")
    if os.path.lexists(folder / CONFIG_FILE):
        return folder
    with os.scandir(folder) as entries:
        some = [folder / entry.name for entry in islice(entries, MAX_ENTRIES)]
    found = sorted(path for path in some if os.path.isfile(path / CONFIG_FILE))
    if len(found) == 1:
        return found[0]
    if not found:
        raise AdapterInvalid(f"{CONFIG_FILE} cannot be opened: No such file or directory")
    names = ", ".join(shown(path.name) for path in found[:10])
    raise AdapterInvalid(f"there are {len(found)} adapters in it; give the folder of one: {names}")


def open_regular(path: Path, max_bytes: int) -> BinaryIO:
    """A regular file of at most `max_bytes` bytes, open for reading. Symbolic links are followed.

    Anything else (missing, folder, pipe, device, empty, too large) is an AdapterInvalid.
    """
    # Looked at before it is opened, since opening a pipe waits for its writer and opening a device
    # may act on it; looked at again afterwards, since the name may lead elsewhere by then.
    try:
        _check_regular(path, os.stat(path))
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        file = os.fdopen(os.open(path, flags), "rb")
    except (OSError, ValueError) as error:
        if isinstance(error, AdapterInvalid):
            raise
        reason = getattr(error, "strerror", None) or str(error)
        raise AdapterInvalid(f"{path.name} cannot be opened: {reason}") from error
    try:
        info = os.fstat(file.fileno())
        _check_regular(path, info)
        if not info.st_size:  # so are most files of /proc, which may wait for ever
            raise AdapterInvalid(f"{path.name} is cut short: it is empty")
        if info.st_size > max_bytes:
            raise AdapterInvalid(
                f"{path.name} has {info.st_size} bytes, above the limit of {max_bytes}"
            )
    except BaseException:
        file.close()
        raise
    return file


def strict_json(data: bytes, what: str) -> dict[str, Any]:
    """The JSON object in `data`, UTF-8, in which no key occurs twice. `what` names it in errors."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
            raise AdapterInvalid(f"{what} has the key {shown(twice)} twice; keep one")
        return found

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique)
    except AdapterInvalid:
        raise
    except (ValueError, RecursionError) as error:
        raise AdapterInvalid(f"{what} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise AdapterInvalid(f"{what} must hold a JSON object, not {type(value).__name__}")
    return value


def _check_regular(path: Path, info: os.stat_result) -> None:
    if not stat.S_ISREG(info.st_mode):
        raise AdapterInvalid(f"{path.name} is not a regular file; only regular files are read")
