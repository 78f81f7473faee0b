"""Text becomes token ids and back, whatever file the model folder brings.

Three readers share one `FolderTokenizer` with its `Vocabulary`: the bytes of every id. Decoding is
the same for all of them: join the bytes, read them as UTF-8, one replacement character for each
broken sequence. Spaces that an English "clean-up" would remove stay.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..arguments import folder as checked_folder
from ..config.model import MAX_JSON_BYTES
from ..errors import TokenizerError
from .folder_tokenizer import unreadable
from .hf_tokenizer import HFTokenizer
from .sentencepiece_tokenizer import SentencePieceTokenizer
from .tiktoken_tokenizer import TiktokenTokenizer

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class Tokenizer(Protocol):
    """What the engine asks of a tokenizer. Ids are 0 to `vocab_size - 1`, specials included."""

    vocab_size: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]  # every id that ends a turn or a text
    special_ids: frozenset[int]

    @property
    def chat_templates(self) -> Mapping[str, str]:
        """The chat templates by name; none for a tokenizer without."""
        ...

    def encode(
        self, text: str, *, add_special_tokens: bool = True, max_length: int | None = None
    ) -> list[int]:
        """Ids of text that may come from anybody: control tokens in it are plain text.

        Control tokens are the special ones, those that a chat template writes, and those in
        brackets. With `add_special_tokens` the ids have BOS, or what the model expects around text.
        Text that cannot have so few as `max_length` tokens is a CapacityError, at little cost.
        """
        ...

    def encode_with_special(
        self, text: str, *, add_special_tokens: bool = False, max_length: int | None = None
    ) -> list[int]:
        """Ids of a prompt whose control tokens are meant, such as a rendered template.

        With `add_special_tokens` it has BOS once, whether the text has it or not.
        """
        ...

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of ids. Ids outside the vocabulary, e.g. of padded rows, have no text."""
        ...

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool | str = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        max_length: int | None = None,
        **variables: Any,
    ) -> list[int]:
        """Ids of a conversation. Control tokens in messages, tools, variables are plain text."""
        ...

    def chat_prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,
        *,
        max_length: int | None = None,
        **ask: Any,
    ) -> tuple[str, list[int]]:
        """Text and ids of a conversation, rendered once."""
        ...

    def render_chat_template(self, messages: Sequence[Mapping[str, Any]], /, **ask: Any) -> str:
        """Its text. Nothing tells any more which control tokens in it were the template's."""
        ...


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a model folder: tokenizer.json first, else tokenizer.model of either kind.

    Raises TokenizerError when the folder has neither or a file cannot be read.
    """
    folder = Path(checked_folder(folder, "a tokenizer's folder", TokenizerError))
    paths = [folder / name for name in ("tokenizer.json", "tokenizer.model")]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise TokenizerError(
            f"{folder} holds neither tokenizer.json nor tokenizer.model; "
            "copy the tokenizer's files there or name the folder that has them"
        )
    try:
        if (size := path.stat().st_size) > MAX_JSON_BYTES:
            raise unreadable(path, f"it has {size} bytes, above the limit of {MAX_JSON_BYTES}")
        with path.open("rb") as file:
            head = file.read(1024)
    except OSError as error:
        raise unreadable(path, str(error)) from error
    if head.startswith(b"version https://git-lfs"):
        raise unreadable(path, "it is a Git LFS pointer")
    if path.suffix == ".json":
        return HFTokenizer(path)
    if re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n", head):
        return TiktokenTokenizer(path)
    return SentencePieceTokenizer(path)
