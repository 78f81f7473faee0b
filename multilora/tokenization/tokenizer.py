"""Text becomes token ids and back, whatever file the model folder brings.

Three readers share one `Vocabulary`: the bytes of every id. Decoding is the same for all of them:
join the bytes, read them as UTF-8, one replacement character for each broken sequence. Spaces that
an English "clean-up" would remove stay. Text from callers is never searched for special tokens.
"""

from __future__ import annotations

import base64
import binascii
import re
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import RequestError, TokenizerError
from .chat_template import LLAMA3_TEMPLATE, ChatTemplate
from .settings import Settings
from .vocabulary import Specials, Vocabulary

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import tokenizers

NUM_LLAMA3_SPECIALS = 256
LLAMA3_SPECIALS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|step_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    *(f"<|reserved_special_token_{i}|>" for i in range(2, NUM_LLAMA3_SPECIALS - 9)),
)
# How Llama 3 cuts text into words before the byte pairs are merged.
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+"
    r"|\s+(?!\S)"
    r"|\s+"
)
MAX_CHUNK = 400_000  # characters that tiktoken's regex is given at once
MAX_RUN = 25_000  # characters of white space, or of anything else, in a row


class Tokenizer(Protocol):
    """What the engine asks of a tokenizer. Ids are 0 to `vocab_size - 1`, specials included."""

    vocab_size: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]  # every id that ends a turn or a text
    special_ids: frozenset[int]

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of a caller's text, with BOS as the model expects; "<|eot_id|>" is plain text."""
        ...

    def encode_with_special(self, text: str) -> list[int]:
        """Ids of a trusted text, e.g. a rendered template: specials are parsed, no BOS is added."""
        ...

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of ids. Ids outside the vocabulary, e.g. of padded rows, have no text."""
        ...

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[int]:
        """Ids of a conversation. Special tokens inside the messages and tools stay plain text."""
        ...


class _FolderTokenizer:
    """What the readers share: everything but the encoding of plain text."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        settings: Settings,
        patterns: Mapping[str, str] | None = None,  # special token -> regex, where it is not itself
    ) -> None:
        self.vocab_size = vocabulary.size
        self.special_ids = vocabulary.special_ids
        self.bos_token_id = settings.bos(vocabulary)
        self.eos_token_ids = settings.eos(vocabulary)
        self._vocabulary = vocabulary
        self._specials = Specials(vocabulary.specials, patterns)
        self._settings = settings
        self._prefix: list[int] = []  # ids that the model expects around every text
        self._suffix: list[int] = []
        self._chat: ChatTemplate | None = settings.chat()

    def _encode_plain(self, text: str, *, first: bool) -> list[int]:
        """Ids of text without any special token; `first` = the text stands at the very start."""
        raise NotImplementedError

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        ids = self._encode_plain(_checked(text), first=True)
        return [*self._prefix, *ids, *self._suffix] if add_special_tokens else ids

    def encode_with_special(self, text: str) -> list[int]:
        return self._encode_parts(_checked(text))

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return self._vocabulary.decode(ids, skip_special_tokens=skip_special_tokens)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[int]:
        text, sentinel = self._template().render_shielded(
            messages, self._specials, add_generation_prompt=add_generation_prompt, tools=tools
        )
        return self._encode_parts(_checked(text), sentinel)

    def render_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """The text of a conversation, to look at; encode it with `apply_chat_template`."""
        return self._template().render(
            messages, add_generation_prompt=add_generation_prompt, tools=tools
        )

    def _template(self) -> ChatTemplate:
        if self._chat is None:
            raise TokenizerError(
                f"{self._settings.folder} has no chat template; add a chat_template.jinja file or "
                "send a plain prompt"
            )
        return self._chat

    def _encode_parts(self, text: str, sentinel: str = "") -> list[int]:
        ids: list[int] = []
        for i, part in enumerate(self._specials.split(text)):
            if isinstance(part, int):
                ids.append(part)
            else:
                plain = part.replace(sentinel, "") if sentinel else part
                ids += self._encode_plain(plain, first=i == 0) if plain else []
        return ids


class HFTokenizer(_FolderTokenizer):
    """Reads `tokenizer.json` with Hugging Face's `tokenizers`."""

    def __init__(self, path: Path) -> None:
        import tokenizers

        from .hf_vocabulary import read_hf_vocabulary, special_patterns, starts_differently

        try:
            self._hf: tokenizers.Tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise TokenizerError(
                f"{path} cannot be read as a tokenizer: {error}; fetch the file again"
            ) from error
        self._hf.no_truncation()
        self._hf.no_padding()
        # Set once, before any use: special tokens in text are plain text for this object.
        self._hf.encode_special_tokens = True
        settings = Settings(path.parent)
        vocabulary = read_hf_vocabulary(self._hf, path)
        super().__init__(vocabulary, settings, special_patterns(self._hf))
        self._prefix, self._suffix = self._surroundings()
        self._glue = self._raw("\n") if starts_differently(self._hf) else []

    def _raw(self, text: str, add_special_tokens: bool = False) -> list[int]:
        ids: list[int] = self._hf.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def _encode_plain(self, text: str, *, first: bool) -> list[int]:
        if not first and self._glue:
            # Only the start of a prompt gets a space put before it: encode what does not stand
            # there after a line feed, and take the line feed away.
            ids = self._raw("\n" + text)
            if ids[: len(self._glue)] == self._glue:
                return ids[len(self._glue) :]
        return self._raw(text)

    def _surroundings(self) -> tuple[list[int], list[int]]:
        """Ids before and after every text, by the file's own post-processor.

        `add_bos_token` in tokenizer_config.json does not override it, as in transformers.
        """
        bare, full = self._raw("a"), self._raw("a", add_special_tokens=True)
        for start in range(len(full) - len(bare) + 1):
            if full[start : start + len(bare)] == bare:
                return full[:start], full[start + len(bare) :]
        return [], []


class TiktokenTokenizer(_FolderTokenizer):
    """Reads Meta's Llama 3 `tokenizer.model`: lines of a base64 token and its rank."""

    def __init__(self, path: Path) -> None:
        import tiktoken

        ranks = _read_ranks(path)
        specials = {token: len(ranks) + i for i, token in enumerate(LLAMA3_SPECIALS)}
        self._encoding = tiktoken.Encoding(
            str(path), pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens=specials
        )
        table = {rank: token for token, rank in ranks.items()}
        super().__init__(Vocabulary(table, specials), Settings(path.parent, LLAMA3_TEMPLATE))
        assert self.bos_token_id is not None
        self._prefix = [self.bos_token_id]

    def _encode_plain(self, text: str, *, first: bool) -> list[int]:
        chunks = _short_chunks(text)
        return [i for chunk in chunks for i in self._encoding.encode_ordinary(chunk)]


class SentencePieceTokenizer(_FolderTokenizer):
    """Reads Llama 2's sentencepiece `tokenizer.model`.

    Each text between special tokens is encoded on its own, with the model's space before it, as
    Meta's code and Hugging Face's first converters do.
    """

    def __init__(self, path: Path) -> None:
        import sentencepiece

        self._model = sentencepiece.SentencePieceProcessor()
        try:
            loaded = self._model.LoadFromSerializedProto(path.read_bytes())
        except (OSError, RuntimeError) as error:
            raise _not_a_model(path, str(error)) from error
        if not loaded or not self._model.GetPieceSize():
            raise _not_a_model(path, "it holds no pieces")
        super().__init__(self._read_vocabulary(), Settings(path.parent))
        config = self._settings.config
        if config.get("add_bos_token", True) and self.bos_token_id is not None:
            self._prefix = [self.bos_token_id]
        eos = self._settings.named_id(self._vocabulary, "eos_token")
        if config.get("add_eos_token") and eos is not None:
            self._suffix = [eos]

    def _encode_plain(self, text: str, *, first: bool) -> list[int]:
        ids: list[int] = self._model.EncodeAsIds(text)
        return ids

    def _read_vocabulary(self) -> Vocabulary:
        model = self._model
        table: dict[int, bytes] = {}
        specials: dict[str, int] = {}
        for i in range(model.GetPieceSize()):
            piece = model.IdToPiece(i)
            if model.IsControl(i) or model.IsUnknown(i):
                specials[piece] = i
            elif model.IsByte(i):
                table[i] = bytes([int(piece[3:5], 16)])
            else:
                table[i] = piece.replace("\u2581", " ").encode()
        spaced = next((i for i, text in table.items() if text[:1] == b" " and len(text) > 1), None)
        strips = spaced is not None and not model.DecodeIds([spaced]).startswith(" ")
        return Vocabulary(table, specials, strip_space=strips)


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a model folder: tokenizer.json first, else tokenizer.model of either kind.

    Raises TokenizerError when the folder has neither or a file cannot be read.
    """
    folder = Path(folder)
    path = folder / "tokenizer.json"
    if path.is_file():
        return HFTokenizer(path)
    path = folder / "tokenizer.model"
    if not path.is_file():
        raise TokenizerError(
            f"{folder} holds neither tokenizer.json nor tokenizer.model; "
            "copy the tokenizer's files there or name the folder that has them"
        )
    try:
        with path.open("rb") as file:
            head = file.read(1024)
    except OSError as error:
        raise _not_a_model(path, str(error)) from error
    if head.startswith(b"version https://git-lfs"):
        raise _not_a_model(path, "it is a Git LFS pointer")
    if re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n", head):
        return TiktokenTokenizer(path)
    return SentencePieceTokenizer(path)


def _read_ranks(path: Path) -> dict[bytes, int]:
    """Token -> rank of a tiktoken file, checked to be whole: ranks 0 to n - 1 and all 256 bytes."""
    ranks: dict[bytes, int] = {}
    number = 0
    try:
        for line in path.read_bytes().splitlines():
            number += 1
            if line:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
    except OSError as error:
        raise _not_a_model(path, str(error)) from error
    except (ValueError, binascii.Error) as error:
        raise _not_a_model(path, f"line {number} is not a base64 token and a rank") from error
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise _not_a_model(path, "its ranks are not 0, 1, 2, ... without gaps")
    if not all(bytes([byte]) in ranks for byte in range(256)):
        raise _not_a_model(path, "it lacks some of the 256 single bytes")
    return ranks


def _not_a_model(path: Path, why: str) -> TokenizerError:
    return TokenizerError(f"{path} cannot be read as a tokenizer: {why}; fetch the file again")


def _short_chunks(text: str) -> list[str]:
    """The text in pieces that keep tiktoken linear in time: Meta's own limits and cuts.

    Only a text of more than MAX_CHUNK characters, or with more than MAX_RUN characters of white
    space or of anything else in a row, is cut; tokens then do not cross a cut.
    """
    cuts = set(range(0, len(text), MAX_CHUNK)) | {len(text)}
    for start, end in pairwise(sorted(cuts)):
        if end - start > MAX_RUN:
            for run in re.compile(r"\s+|\S+").finditer(text, start, end):
                cuts.update(range(run.start(), run.end(), MAX_RUN) if len(run[0]) > MAX_RUN else ())
    return [text[start:end] for start, end in pairwise(sorted(cuts))]


def _checked(text: str) -> str:
    if not isinstance(text, str):
        raise RequestError(f"text must be a string, not {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"the text has a lone surrogate at character {error.start}; send valid Unicode"
        ) from error
    return text
