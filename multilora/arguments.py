"""What callers give, looked at with care: their objects may be of any type, and raise when read."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from .errors import MultiloraError, RequestError, shown

_Made = TypeVar("_Made")
MAX_ITEMS = 1 << 24
"""Of a list whose length nothing else limits."""


def plain(value: Any) -> Any:
    """Numbers of numpy and torch as Python's; anything else as it is."""
    try:
        is_number = getattr(value, "shape", None) == () and callable(getattr(value, "item", None))
        return value.item() if is_number else value
    except Exception:  # a class of the caller's
        return value


def is_int(value: object) -> bool:
    """Whether it is an integer, which a bool is not."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether it is a finite number, which a bool is not."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return isinstance(value, int) or math.isfinite(value)


def flag(value: Any, name: str) -> bool:
    """True or False, of numpy and torch too; a RequestError for anything else."""
    value = plain(value)
    if not isinstance(value, bool):
        raise RequestError(f"{name} must be True or False, not {shown(value)}")
    return value


def read(make: Callable[[Any], _Made], value: Any, name: str) -> _Made:
    """`make(value)`, such as a list of its items; a RequestError for whatever reading raises."""
    try:
        return make(value)
    except Exception as error:
        raise RequestError(f"{name} cannot be read: {shown(error)}") from error


def items(value: Any, name: str, most: int = MAX_ITEMS) -> tuple[Any, ...]:
    """A list, tuple, set or array as a tuple; None is empty."""
    if value is None:
        return ()
    if isinstance(value, str | bytes | Mapping | type) or not hasattr(value, "__len__"):
        raise RequestError(f"{name} must be a list, not {shown(value)}")
    count = read(len, value, name)
    if count > most:
        raise RequestError(f"{name} may have at most {most} entries, not {count}")
    return read(tuple, value, name)


def folder(value: object, name: str, error: type[MultiloraError]) -> str:
    """A folder's path, which may be of none; `error` for what can name no file at all."""
    if not isinstance(value, str | Path):
        raise error(f"{name} must be a folder, not {shown(value)}")
    try:
        os.stat(value)
    except (FileNotFoundError, NotADirectoryError):
        pass  # what is missing is said where it is looked for
    except (OSError, ValueError) as cause:
        why = cause.strerror if isinstance(cause, OSError) else str(cause)
        raise error(f"{name} {shown(str(value))} cannot be looked at: {why}") from cause
    return str(value)
