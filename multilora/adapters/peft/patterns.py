"""Which regular expressions of a stranger are compiled: what `re` and `regex` read alike.

They are matched by `regex`, which has a time limit, but takes more than Python's `re`: recursion,
fuzzy matches, sets of its own. So `re` reads the expression first, as PEFT would, and only what it
means is let through, if it is small when its counted repeats are written out, as the compiler does.
"""

from __future__ import annotations

import re
import warnings
from typing import Any

from ...errors import AdapterInvalid, shown

try:
    from re import _parser as parser  # type: ignore[attr-defined]
except ImportError:  # Python 3.10
    import sre_parse as parser

MAX_PATTERN_LENGTH = 1000
MAX_PATTERN_GROUPS = 100
MAX_PATTERN_SIZE = 4000  # nodes, repeats written out: x{1000} has a thousand
REFUSED_FLAGS = re.VERBOSE | re.LOCALE | re.DEBUG


def check_pattern(field: str, pattern: str) -> None:
    """AdapterInvalid, naming the field, unless the expression is one to compile."""
    if len(pattern) > MAX_PATTERN_LENGTH:
        raise _refused(field, pattern, f"it has more than {MAX_PATTERN_LENGTH} characters")
    # How deep Python itself may go is for every program to set.
    if pattern.count("(") > MAX_PATTERN_GROUPS:
        raise _refused(field, pattern, f"it has more than {MAX_PATTERN_GROUPS} groups")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", FutureWarning)  # a set that `re` may read otherwise
            tree = parser.parse(pattern)
    except (re.error, FutureWarning, RecursionError, OverflowError) as error:
        raise _refused(
            field, pattern, f"it is no regular expression of Python's: {error}"
        ) from error
    if tree.state.flags & REFUSED_FLAGS:
        raise _refused(field, pattern, "it has a flag that changes how it is read")
    try:
        size = _size(tree)
    except RecursionError as error:
        raise _refused(field, pattern, "it is nested too deeply") from error
    if size > MAX_PATTERN_SIZE:
        raise _refused(field, pattern, f"it is larger than {MAX_PATTERN_SIZE} when written out")


def _refused(field: str, pattern: str, why: str) -> AdapterInvalid:
    return AdapterInvalid(f"{field}: {shown(pattern)} is refused: {why}; list the modules by name")


def _size(tree: Any) -> int:
    """Nodes of a parsed expression. An AdapterInvalid-free sum; what it does not know is large."""
    return sum(_node(str(kind), value) for kind, value in tree)


def _node(kind: str, value: Any) -> int:
    if kind in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
        low, high, inner = value
        times = low if high is parser.MAXREPEAT else high
        return max(int(times), 1) * (1 + _size(inner))
    if kind == "SUBPATTERN":
        _, added, removed, inner = value
        return MAX_PATTERN_SIZE + 1 if (added | removed) & REFUSED_FLAGS else 1 + _size(inner)
    if kind == "BRANCH":
        return sum(1 + _size(branch) for branch in value[1])
    if kind in ("ASSERT", "ASSERT_NOT"):
        return 1 + _size(value[1])
    if kind == "ATOMIC_GROUP":
        return 1 + _size(value)
    if kind in ("LITERAL", "NOT_LITERAL"):
        # A brace is a fuzzy match's to `regex` and itself to `re`; no module's name has one.
        return MAX_PATTERN_SIZE + 1 if value in (ord("{"), ord("}")) else 1
    if kind == "IN":
        return len(value)
    return 1 if kind in ("ANY", "AT", "GROUPREF") else MAX_PATTERN_SIZE + 1
