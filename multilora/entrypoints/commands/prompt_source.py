"""The prompts of a command: its options, a file of lines or of JSON objects, or stdin."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...adapters.mix import AdapterSpec
from ...errors import RequestError, shown
from ..prompts import Message

FIELDS = ("prompt", "messages", "adapter")
"""Of a line of JSON: one of the first two, and the third if it likes."""

EXAMPLE = '{"prompt": "..."} or {"messages": [...]}'


@dataclass(frozen=True, slots=True)
class Asked:
    """A prompt, the adapter to answer it with, and where the user wrote it."""

    content: str | Sequence[Message]
    adapter: AdapterSpec = None
    place: str = ""  # file and line; nothing for an option

    @property
    def title(self) -> str:
        """What stands above its answer."""
        return self.content if isinstance(self.content, str) else self.place


def read_prompts(
    options: Sequence[str],
    file: str | None,  # "-": stdin
    adapter: AdapterSpec,  # of the prompts that name none
    loaded: Mapping[str, str],  # folders of adapters by name
) -> list[Asked]:
    """The prompts of the options, then those of the file; of stdin where neither is given.

    RequestError where there are none, and for a bad line, with the file and the number of the line.
    """
    _check_adapter(adapter, loaded, "--use")
    asked = [Asked(text, adapter) for text in options]
    if file is None and not asked:
        if sys.stdin is None or sys.stdin.isatty():
            raise RequestError("give --prompt TEXT, --prompt-file FILE, or prompts on stdin")
        file = "-"
    if file is not None:
        found = _read(file, adapter, loaded)
        if not found:
            raise RequestError(f"{_name(file)} holds no prompts; write one on each line")
        asked += found
    return asked


def _read(file: str, adapter: AdapterSpec, loaded: Mapping[str, str]) -> list[Asked]:
    name, found = _name(file), list[Asked]()
    lines = [
        (f"{name}:{number}", line.removesuffix(b"\r"))
        for number, line in enumerate(_bytes(file).split(b"\n"), 1)
        if line.strip()
    ]
    is_json = file.endswith(".jsonl")
    if file == "-" and lines:  # it has no name that tells
        is_json = lines[0][1].lstrip().startswith(b"{")
    for place, line in lines:
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise RequestError(f"{place}: not UTF-8 ({error.reason}); convert the file") from None
        found.append(_object(text, place, adapter) if is_json else Asked(text, adapter, place))
        _check_adapter(found[-1].adapter, loaded, f'{place}: "adapter"')
    return found


def _object(text: str, place: str, adapter: AdapterSpec) -> Asked:
    """The prompt of one line of JSON."""
    try:
        value = json.loads(text, object_pairs_hook=_unique)
        json.dumps(value, ensure_ascii=False).encode()  # no halves of surrogate pairs
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{place}: not JSON ({error}); write {EXAMPLE} on each line") from None
    if not isinstance(value, dict):
        raise RequestError(f"{place}: must be an object like {EXAMPLE}, not {shown(value)}")
    for field in value:
        if field not in FIELDS:
            raise RequestError(
                f"{place}: unknown field {shown(field)}; there are {', '.join(FIELDS)}"
            )
    content = [value[field] for field in FIELDS[:2] if field in value]
    if len(content) != 1:
        raise RequestError(f"{place}: give one of prompt and messages: {EXAMPLE}")
    if "prompt" in value and not isinstance(content[0], str):
        raise RequestError(f"{place}: prompt must be text, not {shown(content[0])}")
    if "messages" in value and not _are_messages(content[0]):
        raise RequestError(
            f'{place}: messages must be a list like [{{"role": "user", "content": "..."}}], '
            f"not {shown(content[0])}"
        )
    return Asked(
        content[0], _spec(value["adapter"], place) if "adapter" in value else adapter, place
    )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object, none of whose fields hides another."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a field stands twice in an object")
    return found


def _are_messages(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, dict) for one in value)


def _spec(value: Any, place: str) -> AdapterSpec:
    """An adapter's name, a mix, or null for the base."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, dict) and all(type(weight) in (int, float) for weight in value.values()):
        return value
    raise RequestError(
        f"{place}: adapter must be a name, names with weights like "
        f'{{"a": 0.7, "b": 0.3}}, or null for the base, not {shown(value)}'
    )


def _check_adapter(adapter: AdapterSpec, loaded: Mapping[str, str], who: str) -> None:
    names = [adapter] if isinstance(adapter, str) else [] if adapter is None else list(adapter)
    for name in names:
        if name not in loaded:
            raise RequestError(
                f"{who} asks for {shown(name)}, which is not loaded; add --adapter {name}=FOLDER"
            )


def _bytes(file: str) -> bytes:
    """The file's, or stdin's; without a byte order mark."""
    try:
        data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise RequestError(
            f"--prompt-file {shown(file)} cannot be read: {why}; give a file with one prompt "
            "a line, a .jsonl file, or - for stdin"
        ) from None
    return data.removeprefix(b"\xef\xbb\xbf")


def _name(file: str) -> str:
    return "stdin" if file == "-" else file
