"""The tokens of a vocabulary as bytes, and the added ones as strings to find in text."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

SPACES = re.compile(r"\s*")
INSIDE_A_WORD = re.compile(r"\w")


class AddedToken(NamedTuple):
    """A token that is found in a text as a whole, before the vocabulary cuts what is between."""

    content: str
    special: bool = False  # left out of decoded text; the bytes of an answer never spell it
    lstrip: bool = False  # takes the white space before it
    rstrip: bool = False
    single_word: bool = False  # is none within a word


class Vocabulary:
    """The bytes of every id, and which ids are special."""

    def __init__(
        self,
        table: Mapping[int, bytes],
        added: Mapping[int, AddedToken],
        *,
        strip_space: bool = False,  # the first space of a decoded text is not the text's own
    ) -> None:
        self.added = dict(added)
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self.size = max([*table, *added]) + 1
        self._table = [table.get(i, b"") for i in range(self.size)]
        for i, token in added.items():
            self._table[i] = token.content.encode()
        self._strip_space = strip_space

    def id_of(self, content: str) -> int | None:
        """The id of an added token."""
        return next((i for i, token in self.added.items() if token.content == content), None)

    @property
    def longest(self) -> int:
        """Bytes of the longest token."""
        return max(map(len, self._table))

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """The text of ids; one replacement character for each broken UTF-8 sequence."""
        skipped = self.special_ids if skip_special_tokens else ()
        joined = b"".join(self._table[i] for i in ids if 0 <= i < self.size and i not in skipped)
        if self._strip_space:
            joined = joined.removeprefix(b" ")
        return joined.decode("utf-8", "replace")


class AddedTokenFinder:
    """Finds the added tokens of a vocabulary in text: the leftmost first, of those the longest."""

    def __init__(self, added: Mapping[int, AddedToken]) -> None:
        self._found = {token.content: (i, token) for i, token in added.items() if token.content}
        longest_first = sorted(self._found, key=len, reverse=True)
        self._finder = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def split(self, text: str, accept: Callable[[AddedToken, int, int], bool]) -> list[int | str]:
        """Ids of the tokens and the plain texts between them, in order; empty texts are left out.

        What `accept(token, start, end)` denies is plain text, as is what stands within a word.
        """
        parts: list[int | str] = []
        end = at = 0
        while match := self._finder.search(text, at):
            start, stop = match.span()
            token_id, token = self._found[match.group()]
            within = token.single_word and _is_within_a_word(text, start, stop)
            if within or not accept(token, start, stop):
                at = start + 1
                continue
            before = text[end:start]
            parts += [before.rstrip() if token.lstrip else before, token_id]
            spaces = SPACES.match(text, stop) if token.rstrip else None
            end = at = spaces.end() if spaces else stop
        parts.append(text[end:])
        return [part for part in parts if part != ""]


def _is_within_a_word(text: str, start: int, stop: int) -> bool:
    return any(
        INSIDE_A_WORD.match(side) for side in (text[start - 1 : start], text[stop : stop + 1])
    )
