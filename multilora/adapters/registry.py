"""`adapters.toml`: which adapters there are, where each lies and what it must be.

[adapters]
feedback = "feedback"             # a folder beside this file

[adapters.proposal]
source = "hf://my-org/proposal@v3"
digest = "3fa9..."                # of its content; another one is refused
pinned = true                     # stays in host memory once it is loaded
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ..errors import AdapterError, ConfigError, shown
from .loader import AdapterSource, check_digest
from .mix import check_name
from .peft.files import open_regular

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MAX_BYTES = 16 << 20
KINDS: dict[str, type] = {"source": str, "digest": str, "pinned": bool}


def read_registry(path: str | Path) -> dict[str, AdapterSource]:
    """The adapters of a file by name; paths in it are relative to its folder.

    ConfigError, naming the entry, when the file cannot be read or is wrong anywhere.
    """
    path = Path(path)
    try:
        with open_regular(path, MAX_BYTES) as file:
            found = tomllib.loads(file.read(MAX_BYTES).decode())
    except (AdapterError, OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"the adapters of {shown(str(path))} cannot be read: {error}") from error
    adapters = found.pop("adapters", None)
    if found or not isinstance(adapters, dict):
        raise ConfigError(f"{path} must have a table [adapters], and nothing beside it")
    return {name: _source(name, entry, path) for name, entry in adapters.items()}


def _source(name: str, entry: Any, path: Path) -> AdapterSource:
    fields = {"source": entry} if isinstance(entry, str) else entry
    try:
        check_name(name)
        if not isinstance(fields, dict) or "source" not in fields:
            raise AdapterError('it needs a source, as in source = "hf://org/name"')
        for key, value in fields.items():
            if key not in KINDS:
                raise AdapterError(f"it has no {shown(key)}; it may have {', '.join(KINDS)}")
            if not isinstance(value, KINDS[key]):
                raise AdapterError(f"{key} must be a {KINDS[key].__name__}, not {shown(value)}")
        check_digest(fields.get("digest"))
    except AdapterError as error:
        raise ConfigError(f"adapter {shown(name)} in {path}: {error}") from error
    place = fields.pop("source")
    is_remote = "://" in place
    return AdapterSource(place if is_remote else path.absolute().parent / place, **fields)
