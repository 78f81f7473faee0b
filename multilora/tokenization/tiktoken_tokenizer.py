"""Reads Meta's Llama 3 `tokenizer.model`: lines of a base64 token and its rank."""

from __future__ import annotations

import base64
import binascii
import re
from itertools import pairwise
from typing import TYPE_CHECKING

from ..errors import TokenizerError
from .chat_template import LLAMA3_TEMPLATE
from .folder_tokenizer import FolderTokenizer, unreadable
from .settings import Settings
from .vocabulary import AddedToken

if TYPE_CHECKING:
    from pathlib import Path

NUM_SPECIALS = 256
MAX_RANKS = 128_000  # Llama 3 has as many; Llama 4, which cuts words otherwise, has 200,000
NAMED_SPECIALS = (
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
    "<|image|>",
)
# The rest is reserved, named as Meta's code has done since Llama 3.2.
NUM_RESERVED = NUM_SPECIALS - len(NAMED_SPECIALS)
LLAMA3_SPECIALS = NAMED_SPECIALS + tuple(
    f"<|reserved_special_token_{i + 2}|>" for i in range(NUM_RESERVED)
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


class TiktokenTokenizer(FolderTokenizer):
    """Llama 3's, with its special tokens after the ranks, and its template where there is none."""

    def __init__(self, path: Path) -> None:
        import tiktoken

        ranks = _read_ranks(path)
        if len(ranks) > MAX_RANKS:
            raise TokenizerError(
                f"{path} has {len(ranks)} ranks and Llama 3 has {MAX_RANKS}: this one, perhaps "
                "Llama 4's, cuts words in a way that the file does not tell; add the model's "
                "tokenizer.json"
            )
        self._encoding = tiktoken.Encoding(
            str(path), pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens={}
        )
        table = {rank: token for token, rank in ranks.items()}
        own = {
            len(ranks) + i: AddedToken(token, special=True)
            for i, token in enumerate(LLAMA3_SPECIALS)
        }
        settings = Settings(path.parent)
        super().__init__(
            settings, table, own, keeps_all_text=True, built_in_template=LLAMA3_TEMPLATE
        )
        if settings.config.get("add_bos_token", True) and self.bos_token_id is not None:
            self._prefix = [self.bos_token_id]

    def _encode_plain(self, text: str, *, first: bool) -> list[int]:
        chunks = _short_chunks(text)
        return [i for chunk in chunks for i in self._encoding.encode_ordinary(chunk)]


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
        raise unreadable(path, str(error)) from error
    except (ValueError, binascii.Error) as error:
        raise unreadable(path, f"line {number} is not a base64 token and a rank") from error
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise unreadable(path, "its ranks are not 0, 1, 2, ... without gaps")
    if not all(bytes([byte]) in ranks for byte in range(256)):
        raise unreadable(path, "it lacks some of the 256 single bytes")
    return ranks


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
