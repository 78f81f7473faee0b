"""What the JSON files beside a vocabulary say: added and special tokens, end ids, chat templates.

Where each fact is read, and which place wins. The order is transformers'.

    added tokens     all of these, and of two for one token the first: tokenizer_config.json's
                     `added_tokens_decoder`; the vocabulary's own file (tokenizer.json, control
                     pieces of tokenizer.model); added_tokens.json, if there is no
                     `added_tokens_decoder`
    named tokens     `bos_token` and the like: special_tokens_map.json, if there is no
                     `added_tokens_decoder`; tokenizer_config.json; "" names none
    special tokens   the added tokens that say so, and all named ones, those in
                     `extra_special_tokens` and `additional_special_tokens` too
    start of a text  the named `bos_token`; START_TOKENS
    around a text    tokenizer.json's post-processor; without that file `add_bos_token` (true) and
                     `add_eos_token` (false) of tokenizer_config.json
    end tokens       all of these: the named `eos_token`; END_TOKENS; `eos_token_id` of config.json
                     and of generation_config.json
    chat templates   chat_template.jinja ("default") with additional_chat_templates/NAME.jinja;
                     tokenizer_config.json's `chat_template`; Llama 3's for Meta's folders
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ..config.model import read_json
from ..errors import CheckpointError, TokenizerError
from .vocabulary import AddedToken

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from .vocabulary import Vocabulary

# Special tokens that end a text or a turn in the families we read.
END_TOKENS = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>", "</s>")
START_TOKENS = ("<|begin_of_text|>", "<s>")
MAX_ID = 1 << 24  # a table has as many rows
MORE_NAMED = ("extra_special_tokens", "additional_special_tokens")


class Settings:
    """What the JSON files beside a vocabulary say about it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = _read_optional(folder / "tokenizer_config.json")
        self._has_decoder = "added_tokens_decoder" in self.config
        legacy = {} if self._has_decoder else _read_optional(folder / "special_tokens_map.json")
        self._settings = {**self.config, **legacy}
        self.named = dict(_named(self._settings))
        self._special = {*self.named.values(), *_more_named(self._settings)}

    def added_tokens(
        self, own: Mapping[int, AddedToken], pieces: Mapping[str, int]
    ) -> dict[int, AddedToken]:
        """All added tokens of a vocabulary with `own` ones in its file, and other `pieces`.

        A declared token that the vocabulary has keeps the vocabulary's id.
        """
        added = dict(own)
        ids = {**pieces, **{token.content: i for i, token in own.items()}}
        for declared_id, token in self._declared().items():
            i = ids.setdefault(token.content, declared_id)
            if self._has_decoder or i not in own:
                added[i] = token
        for content in self._special & ids.keys():
            i = ids[content]
            added[i] = added.get(i, AddedToken(content))._replace(special=True)
        return added

    def bos(self, vocabulary: Vocabulary) -> int | None:
        """The id that begins a text: the one that is named, else one of the known names."""
        if "bos_token" in self._settings:
            return self.named_id(vocabulary, "bos_token")
        found = (vocabulary.id_of(content) for content in START_TOKENS)
        return next((i for i in found if i is not None), None)

    def eos(self, vocabulary: Vocabulary) -> tuple[int, ...]:
        """Every id that ends a text: those of the JSON files and those of known names, sorted."""
        known = {vocabulary.id_of(content) for content in END_TOKENS} & vocabulary.special_ids
        found = {*known, self.named_id(vocabulary, "eos_token")} - {None}
        for name in ("config.json", "generation_config.json"):
            path = self.folder / name
            ids = _read_optional(path).get("eos_token_id")
            for i in ids if isinstance(ids, list) else [] if ids is None else [ids]:
                if type(i) is not int or not 0 <= i < vocabulary.size:
                    raise TokenizerError(
                        f"{path}: eos_token_id {i!r} is no id below {vocabulary.size}; correct it"
                    )
                found.add(i)
        return tuple(sorted(i for i in found if i is not None))

    def named_id(self, vocabulary: Vocabulary, name: str) -> int | None:
        """Id of a token that the files name, e.g. as `eos_token`, or None."""
        token = self.named.get(name)
        if not token:
            return None
        found = vocabulary.id_of(token)
        if found is None:
            raise TokenizerError(
                f"{self.folder / 'tokenizer_config.json'}: {name} {token!r} is not among the "
                "tokens of the tokenizer; the files do not belong together"
            )
        return found

    def _declared(self) -> dict[int, AddedToken]:
        if self._has_decoder:
            return _decoder(self.config["added_tokens_decoder"], self.folder)
        path = self.folder / "added_tokens.json"
        found = _read_optional(path)
        for content, i in found.items():
            if type(i) is not int or not 0 <= i < MAX_ID:
                raise TokenizerError(f"{path}: {content!r} has no id but {i!r}; correct the file")
        return {i: AddedToken(content) for content, i in found.items()}


def _decoder(found: Any, folder: Path) -> dict[int, AddedToken]:
    """The tokens of an `added_tokens_decoder`: {"128009": {"content": "<|eot_id|>", ...}}."""
    declared = {}
    flags = ("special", "lstrip", "rstrip", "single_word")
    try:
        for key, token in found.items():
            content = token["content"]
            declared[int(key)] = AddedToken(content, *(bool(token.get(flag)) for flag in flags))
            if not isinstance(content, str) or not 0 <= int(key) < MAX_ID:
                raise ValueError(f"{key!r}: {content!r}")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise TokenizerError(
            f"{folder / 'tokenizer_config.json'}: added_tokens_decoder must be like "
            f'{{"7": {{"content": "<s>"}}}} ({error}); correct it'
        ) from error
    return declared


def _named(settings: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    for name, value in settings.items():
        text = _content(value)
        if name.endswith("_token") and text is not None:
            yield name, text


def _more_named(settings: Mapping[str, Any]) -> Iterable[str]:
    for name in MORE_NAMED:
        found = settings.get(name)
        values = found.values() if isinstance(found, dict) else found
        for value in values if isinstance(values, Iterable) else ():
            text = _content(value)
            if text is not None:
                yield text


def _content(token: Any) -> str | None:
    """A token's text: it is written as a string, or as an object."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _read_optional(path: Path) -> dict[str, Any]:
    try:
        return read_json(path) if path.is_file() else {}
    except CheckpointError as error:
        raise TokenizerError(f"{error}; fetch the file again or remove it") from error
    except RecursionError as error:
        raise TokenizerError(f"{path} is nested too deep; fetch the file again") from error
