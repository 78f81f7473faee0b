"""Text that knows which of its characters the chat template wrote, whatever the template does.

Control tokens in a rendered chat are trusted only where the template itself wrote every character.
So what a template writes and what the messages say are both `TracedText`: strings of which each
character is marked. All that strings can do gives a string with the marks of where its characters
came from, and what is not known here gives plain text, as if the messages had said it: text can
lose the template's trust, never gain it. To the template both are strings like any other.

Runs in the template's own process: imports nothing but the standard library.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from string import Formatter
from typing import Any, SupportsIndex

PRINTF = re.compile(r"%(?:\(([^)]*)\))?[-+ #0]*(?:\d+|\*)?(?:\.(?:\d+|\*)?)?[hlL]?(.)", re.DOTALL)


class TracedText(str):
    """A string with a mark for each character: whether the template wrote it."""

    __slots__ = ("_marks",)  # with underscores: the sandbox shows them to no template
    _marks: bytes  # 1 for each character of the template, 0 for others

    def __new__(cls, text: str = "", marks: bytes = b"") -> TracedText:
        """The text with its marks; without any it is not the template's."""
        made = super().__new__(cls, text)
        made._marks = marks or bytes(len(text))
        return made

    __hash__ = str.__hash__

    def __str__(self) -> TracedText:
        return self

    def __add__(self, other: str) -> TracedText:
        # Markup escapes what it is added to, on either side.
        if not isinstance(other, str) or hasattr(other, "__html__"):
            return NotImplemented
        return joined("", (self, other))

    def __radd__(self, other: str) -> TracedText:
        return joined("", (other, self)) if isinstance(other, str) else NotImplemented

    def __mul__(self, times: SupportsIndex) -> TracedText:
        return TracedText(str.__mul__(self, times), self._marks * times.__index__())

    __rmul__ = __mul__

    def __mod__(self, values: Any) -> TracedText:
        return _printed(self, values)

    def __getitem__(self, key: Any) -> TracedText:
        if isinstance(key, slice):
            return TracedText(str.__getitem__(self, key), self._marks[key])
        return TracedText(str.__getitem__(self, key), bytes([self._marks[key]]))

    def __iter__(self) -> Iterator[TracedText]:
        return (self[i] for i in range(len(self)))

    def join(self, parts: Iterable[str]) -> TracedText:
        return joined(self, parts)

    def strip(self, chars: str | None = None) -> TracedText:
        return self.lstrip(chars).rstrip(chars)

    def lstrip(self, chars: str | None = None) -> TracedText:
        return self[len(self) - len(str.lstrip(self, chars)) :]

    def rstrip(self, chars: str | None = None) -> TracedText:
        return self[: len(str.rstrip(self, chars))]

    def removeprefix(self, prefix: str) -> TracedText:
        return self[len(prefix) :] if self.startswith(prefix) else self

    def removesuffix(self, suffix: str) -> TracedText:
        return self[: len(self) - len(suffix)] if self.endswith(suffix) else self

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[Any]:
        return self._pieces(str.split(self, sep, maxsplit), sep)

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[Any]:
        return self._pieces(str.rsplit(self, sep, maxsplit), sep)

    def splitlines(self, keepends: bool = False) -> list[Any]:
        return self._pieces(str.splitlines(self, keepends), None)

    def partition(self, sep: str) -> tuple[Any, Any, Any]:
        head, found, _ = str.partition(self, sep)
        end = len(head) + len(found)
        return self[: len(head)], self[len(head) : end], self[end:]

    def rpartition(self, sep: str) -> tuple[Any, Any, Any]:
        head, found, _ = str.rpartition(self, sep)
        end = len(head) + len(found)
        return self[: len(head)], self[len(head) : end], self[end:]

    def replace(self, old: str, new: str, count: SupportsIndex = -1) -> TracedText:
        if not old:
            return TracedText(str.replace(self, old, new, count))
        return joined(new, self.split(old, count))

    def _pieces(self, pieces: list[str], sep: str | None) -> list[TracedText]:
        """The pieces, which stand in the text in this order, with `sep` or white space between."""
        found, at = [], 0
        for piece in pieces:
            at = self.find(piece, at) if sep is None else at
            found.append(self[at : at + len(piece)])
            at += len(piece) + (0 if sep is None else len(sep))
        return found


class TracedJSON(TracedText):
    """JSON text of an object, which a template may also use as the object that it tells."""

    __slots__ = ("_value",)
    _value: dict[str, Any]
    __hash__ = str.__hash__

    def __getitem__(self, key: Any) -> Any:
        return self._value[key] if isinstance(key, str) else super().__getitem__(key)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._value)

    def __contains__(self, key: object) -> bool:
        return key in self._value or (isinstance(key, str) and str.__contains__(self, key))

    def keys(self) -> Any:
        return self._value.keys()

    def values(self) -> Any:
        return self._value.values()

    def items(self) -> Any:
        return self._value.items()

    def get(self, key: str, default: Any = None) -> Any:
        return self._value.get(key, default)


Mapping.register(TracedJSON)


def objects(value: Any) -> Any:
    """The value with objects in the place of their JSON texts."""
    if isinstance(value, TracedJSON):
        return value._value
    if isinstance(value, dict):
        return {key: objects(item) for key, item in value.items()}
    return [objects(item) for item in value] if isinstance(value, (list, tuple)) else value


def template_runs(text: TracedText) -> list[int]:
    """Where the template's text begins and ends, by turns."""
    return [end for match in re.finditer(b"\1+", text._marks) for end in match.span()]


def written(text: str) -> TracedText:
    """Text of the template."""
    return TracedText(text, b"\1" * len(text))


def said(value: Any) -> Any:
    """JSON values of the messages, their strings marked as not the template's."""
    if isinstance(value, str):
        return TracedText(value)
    if isinstance(value, dict):
        return {key: said(item) for key, item in value.items()}
    return [said(item) for item in value] if isinstance(value, list) else value


def said_json(text: str) -> TracedJSON:
    """JSON text of an object, from the messages."""
    made = TracedJSON(text)
    assert isinstance(made, TracedJSON)
    made._value = said(json.loads(text))
    return made


def joined(separator: str, parts: Iterable[str]) -> TracedText:
    """`separator.join(parts)`."""
    parts = list(parts)
    marks = _marks(separator).join(map(_marks, parts))
    return TracedText(str.join(separator, parts), marks)


def formatted(formatter: Formatter, text: TracedText, args: Any, kwargs: Any) -> TracedText:
    """`text.format(*args, **kwargs)`."""
    whole = formatter.vformat(text, args, kwargs)
    if 0 in text._marks:
        return TracedText(whole)
    parts: list[str] = []
    number = 0
    for literal, name, spec, conversion in formatter.parse(text):
        parts.append(written(literal))
        if name is None:
            continue
        if not name:
            name, number = str(number), number + 1
        value, _ = formatter.get_field(name, args, kwargs)
        plain = not spec and not conversion and isinstance(value, TracedText)
        if not plain and "{" in (spec or ""):
            return TracedText(whole)
        parts.append(
            value
            if plain
            else formatter.format_field(formatter.convert_field(value, conversion), spec or "")
        )
    return _if_equal(whole, parts)


def _printed(text: TracedText, values: Any) -> TracedText:
    """`text % values`."""
    whole = str.__mod__(text, values)
    rest = iter(values if isinstance(values, tuple) else (values,))
    parts: list[str] = []
    end = 0
    for match in PRINTF.finditer(text):
        parts.append(text[end : match.start()])
        end = match.end()
        name, kind = match.groups()
        if "*" in match[0]:
            return TracedText(whole)
        if kind == "%":
            parts.append(text[match.end() - 1 : match.end()])
            continue
        value = next(rest) if name is None else values[name]
        plain = match[0][-1:] == "s" and len(match[0]) == 2 + (0 if name is None else len(name) + 2)
        if plain and isinstance(value, TracedText):
            parts.append(value)
        else:
            parts.append(str.__mod__(match[0], (value,) if name is None else {name: value}))
    return _if_equal(whole, [*parts, text[end:]])


def _if_equal(whole: str, parts: list[str]) -> TracedText:
    made = joined("", parts)
    return made if made == whole else TracedText(whole)


def _marks(text: str) -> bytes:
    return text._marks if isinstance(text, TracedText) else bytes(len(text))


def _is_templates(value: Any) -> bool:
    """Whether an argument brings no text of the messages: a table of `translate` may."""
    return 0 not in _marks(value) if isinstance(value, str) else isinstance(value, int)


def _whole(name: str) -> Any:
    """A method of strings whose result is the template's if all the text was, and all arguments."""
    method = getattr(str, name)

    def call(self: TracedText, *args: Any, **kwargs: Any) -> TracedText:
        made = method(self, *args, **kwargs)
        given = (self, *args, *kwargs.values())
        return written(made) if all(map(_is_templates, given)) else TracedText(made)

    call.__name__ = name
    return call


for _name in (
    *("capitalize", "casefold", "center", "expandtabs", "ljust", "lower", "rjust", "swapcase"),
    *("title", "translate", "upper", "zfill"),
):
    setattr(TracedText, _name, _whole(_name))
