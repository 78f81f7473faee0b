"""What the JSON files beside a tokenizer say: named special tokens, end ids, chat templates."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..config.model import read_json
from ..errors import CheckpointError, TokenizerError
from .chat_template import ChatTemplate, find_templates

if TYPE_CHECKING:
    from pathlib import Path

    from .vocabulary import Vocabulary

# Special tokens that end a text or a turn in the families we read.
END_TOKENS = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>", "</s>")
START_TOKENS = ("<|begin_of_text|>", "<s>")


class Settings:
    """What the JSON files beside a tokenizer say about it."""

    def __init__(self, folder: Path, built_in_template: str | None = None) -> None:
        self.folder = folder
        self.config = _read_optional(folder / "tokenizer_config.json")
        self._named = {**_read_optional(folder / "special_tokens_map.json"), **self.config}
        self._templates = find_templates(folder, self.config)
        if not self._templates and built_in_template:
            self._templates = {"default": built_in_template}
            self._named.setdefault("bos_token", START_TOKENS[0])

    def chat(self) -> ChatTemplate | None:
        """The folder's chat template, if any."""
        if not self._templates:
            return None
        variables = {name: text for name in self._named if (text := self._token(name)) is not None}
        return ChatTemplate(self._templates, origin=str(self.folder), variables=variables)

    def bos(self, vocabulary: Vocabulary) -> int | None:
        """The id that begins a text: the one that is named, else one of the known names."""
        if "bos_token" in self._named:
            return self.named_id(vocabulary, "bos_token")
        return next(
            (vocabulary.specials[t] for t in START_TOKENS if t in vocabulary.specials), None
        )

    def eos(self, vocabulary: Vocabulary) -> tuple[int, ...]:
        """Every id that ends a text: those of the JSON files and those of known names, sorted."""
        found = {vocabulary.specials[t] for t in END_TOKENS if t in vocabulary.specials}
        named = self.named_id(vocabulary, "eos_token")
        found |= set() if named is None else {named}
        for name in ("config.json", "generation_config.json"):
            path = self.folder / name
            ids = _read_optional(path).get("eos_token_id")
            for i in ids if isinstance(ids, list) else [] if ids is None else [ids]:
                if type(i) is not int or not 0 <= i < vocabulary.size:
                    raise TokenizerError(
                        f"{path}: eos_token_id {i!r} is no id below {vocabulary.size}; correct it"
                    )
                found.add(i)
        return tuple(sorted(found))

    def named_id(self, vocabulary: Vocabulary, name: str) -> int | None:
        """Id of a special token that tokenizer_config.json names, or None."""
        token = self._token(name)
        if token is None:
            return None
        if token not in vocabulary.specials:
            raise TokenizerError(
                f"{self.folder / 'tokenizer_config.json'}: {name} {token!r} is not among the "
                "special tokens of the tokenizer; the files do not belong together"
            )
        return vocabulary.specials[token]

    def _token(self, name: str) -> str | None:
        value = self._named.get(name) if name.endswith("_token") else None
        value = value.get("content") if isinstance(value, dict) else value
        return value if isinstance(value, str) else None


def _read_optional(path: Path) -> dict[str, Any]:
    try:
        return read_json(path) if path.is_file() else {}
    except CheckpointError as error:
        raise TokenizerError(f"{error}; fetch the file again or remove it") from error
