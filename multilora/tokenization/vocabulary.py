"""The tokens of a vocabulary as bytes, and the special ones as strings to find in text."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class Vocabulary:
    """The bytes of every id, and which ids are special."""

    def __init__(
        self,
        table: Mapping[int, bytes],
        specials: Mapping[str, int],
        *,
        strip_space: bool = False,  # the first space of a decoded text is not the text's own
    ) -> None:
        self.specials = dict(specials)
        self.special_ids = frozenset(specials.values())
        self.size = max([*table, *self.special_ids]) + 1
        self._table = [table.get(i, b"") for i in range(self.size)]
        for token, i in specials.items():
            self._table[i] = token.encode()
        self._strip_space = strip_space

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """The text of ids; one replacement character for each broken UTF-8 sequence."""
        skipped = self.special_ids if skip_special_tokens else ()
        joined = b"".join(self._table[i] for i in ids if 0 <= i < self.size and i not in skipped)
        if self._strip_space:
            joined = joined.removeprefix(b" ")
        return joined.decode("utf-8", "replace")


class Specials:
    """The special tokens of a vocabulary as strings that can be found in, or kept out of, text."""

    def __init__(self, ids: Mapping[str, int], patterns: Mapping[str, str] | None = None) -> None:
        patterns = patterns or {}
        longest_first = sorted(ids, key=len, reverse=True)
        found = "|".join(patterns.get(token, re.escape(token)) for token in longest_first)
        plain = "|".join(map(re.escape, longest_first))
        self._ids = dict(ids)
        self._finder = re.compile(f"({found})") if ids else None
        # Without case: a template may lower what it is given.
        self._breaker = re.compile(plain, re.IGNORECASE) if ids else None
        self._starts = {token[:n].lower() for token in ids for n in range(1, len(token))}
        self._longest_start = max(map(len, self._starts), default=0)

    def split(self, text: str) -> list[int | str]:
        """Special ids and the plain texts between them, in order; empty texts are left out."""
        if self._finder is None:
            return [text] if text else []
        parts: list[int | str] = []
        end = 0
        for match in self._finder.finditer(text):
            parts += [text[end : match.start()], self._id_of(match.group())]
            end = match.end()
        parts.append(text[end:])
        return [part for part in parts if part != ""]

    def _id_of(self, found: str) -> int:
        # A token that also takes the white space around it was matched together with that.
        return self._ids[found] if found in self._ids else self._ids[found.strip()]

    def break_in(self, text: str, sentinel: str) -> str:
        """The text with a sentinel inside each special token, and in one that begins at its end.

        The second keeps two strings of a caller from making a token when a template joins them.
        """
        if self._breaker is None:
            return text
        end = len(text.rstrip())  # templates trim
        cuts = {match.start() + 1 for match in self._breaker.finditer(text)}
        for length in range(1, min(self._longest_start, end) + 1):
            if text[end - length : end].lower() in self._starts:
                cuts.add(end - length + 1)
        pieces, last = [], 0
        for cut in sorted(cuts):
            pieces.append(text[last:cut])
            last = cut
        return sentinel.join([*pieces, text[last:]])
