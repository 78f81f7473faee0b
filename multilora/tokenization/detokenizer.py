"""Token ids become text while they are generated, never half a character.

The window never grows: a UTF-8 character has at most four bytes and a token at least one, so a few
earlier tokens are enough to know what the next ones complete. That holds for broken bytes and for
tokens that always end inside a character, where a window that waits for clean text would grow.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .tokenizer import Tokenizer

BROKEN = "\N{REPLACEMENT CHARACTER}"
CONTEXT = 8  # tokens kept from before: more than the bytes of an unfinished character


class IncrementalDetokenizer:
    """Streams the text of output ids that follow a prompt.

    All pieces together are `decode(prompt + output)` after `decode(prompt)`. A final replacement
    character is held back, since the next token may complete it. When the prompt itself ends inside
    a character, the output that completes it brings the whole character.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int] = (),
        *,
        skip_special_tokens: bool = True,
    ) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        # A long prompt is not walked: its end holds enough ids that carry text.
        tail = self._with_text(prompt_ids[-4 * CONTEXT :])
        if len(tail) < CONTEXT:
            tail = self._with_text(prompt_ids)
        self._tail = tail[-CONTEXT:]
        self._pieces: list[str] = []
        # Whether the held-back character stands in the prompt: it is not output then.
        self._held_by_prompt = self._decode(self._tail).endswith(BROKEN)

    @property
    def text(self) -> str:
        """Everything emitted so far."""
        if len(self._pieces) > 1:
            self._pieces = ["".join(self._pieces)]
        return self._pieces[0] if self._pieces else ""

    def append(self, ids: Sequence[int]) -> str:
        """The text that `ids` complete; may be empty."""
        ids = self._with_text(ids)
        if not ids:
            return ""
        before = _settled(self._decode(self._tail))
        window = self._tail + ids
        piece = _settled(self._decode(window))[len(before) :]
        self._tail = window[-CONTEXT:]
        return self._emit(piece)

    def finish(self) -> str:
        """What was held back, as a replacement character. No ids may follow."""
        held = self._decode(self._tail)[-1:]
        self._tail = []
        return self._emit(held) if held == BROKEN else ""

    def _emit(self, piece: str) -> str:
        if piece and self._held_by_prompt:
            self._held_by_prompt = False
            piece = piece.removeprefix(BROKEN)
        if piece:
            self._pieces.append(piece)
        return piece

    def _with_text(self, ids: Sequence[int]) -> list[int]:
        """The ids with text of their own: others would push bytes out of the window."""
        size, special = self._tokenizer.vocab_size, self._tokenizer.special_ids
        return [i for i in ids if 0 <= i < size and not (self._skip and i in special)]

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip)


def _settled(text: str) -> str:
    """The text without a last character that later bytes may still change."""
    return text.removesuffix(BROKEN)
