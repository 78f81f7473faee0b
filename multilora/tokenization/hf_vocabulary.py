"""What a Hugging Face tokenizer's ids are in bytes, read from the parts it declares."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import TokenizerError
from .vocabulary import AddedToken

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import tokenizers

BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class HFVocabulary(NamedTuple):
    """What the parts of a tokenizer.json say of its ids."""

    table: dict[int, bytes]
    added: dict[int, AddedToken]
    strip_space: bool  # decoding takes the first space away


def read_hf_vocabulary(hf: tokenizers.Tokenizer, path: Path) -> HFVocabulary:
    """The bytes of every id. Raises TokenizerError for a decoder that has no such table."""
    steps = list(_flat(_declared(hf.decoder), "decoders"))
    strips = any(
        step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never"
        for step in steps
    )
    for step in steps:
        if step["type"] == "Strip":
            if step["content"] != " " or step["stop"] or step["start"] > 1:
                raise _unsupported(path, step)
            strips = strips or step["start"] == 1
    to_bytes = _byte_reader(steps, path)
    table = {i: to_bytes(piece) for piece, i in hf.get_vocab(with_added_tokens=False).items()}
    added = {
        i: AddedToken(t.content, t.special, t.lstrip, t.rstrip, t.single_word)
        for i, t in hf.get_added_tokens_decoder().items()
    }
    if not table and not added:
        raise TokenizerError(f"{path} has an empty vocabulary; fetch the file again")
    return HFVocabulary(table, added, strips)


def starts_differently(hf: tokenizers.Tokenizer) -> bool:
    """Whether only the start of a text gets a space put before it (not every part of it)."""
    steps = _flat(_declared(hf.pre_tokenizer), "pretokenizers")
    return any(s["type"] == "Metaspace" and s.get("prepend_scheme") == "first" for s in steps)


def keeps_all_text(hf: tokenizers.Tokenizer) -> bool:
    """Whether every byte of a text is in some token: none is normalized away or part of `unk`."""
    for step in _flat(_declared(hf.normalizer), "normalizers"):
        old = step["pattern"].get("String") if step["type"] == "Replace" else None
        grows = old is not None and len(step["content"].encode()) >= len(old.encode())
        if step["type"] != "Prepend" and not grows:
            return False
    steps = list(_flat(_declared(hf.pre_tokenizer), "pretokenizers"))
    if any(
        step["type"] not in ("ByteLevel", "Metaspace", "Split", "Digits")
        or step.get("behavior") == "Removed"
        for step in steps
    ):
        return False
    is_bytes = any(step["type"] == "ByteLevel" for step in steps)
    return is_bytes or bool(getattr(hf.model, "byte_fallback", False))


def _byte_reader(steps: list[dict[str, Any]], path: Path) -> Callable[[str], bytes]:
    """The function from a piece of the vocabulary to its bytes."""
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        codes = {letter: code for code, letter in _byte_letters().items()}

        def read_letters(piece: str) -> bytes:
            if all(letter in codes for letter in piece):
                return bytes(codes[letter] for letter in piece)
            return piece.encode()

        return read_letters
    replaced = []
    for step in steps:
        if step["type"] == "Replace" and "String" in step["pattern"]:
            replaced.append((step["pattern"]["String"], step["content"]))
        elif step["type"] == "Metaspace":
            replaced.append((step["replacement"], " "))
        elif step["type"] not in ("ByteFallback", "Fuse", "Strip"):
            raise _unsupported(path, step)
    if not replaced:
        raise _unsupported(path, {"type": "+".join(kinds) or "none"})

    def read_piece(piece: str) -> bytes:
        byte = BYTE_PIECE.fullmatch(piece) if "ByteFallback" in kinds else None
        if byte:
            return bytes([int(byte[1], 16)])
        for old, new in replaced:
            piece = piece.replace(old, new)
        return piece.encode()

    return read_piece


def _byte_letters() -> dict[int, str]:
    """The letter that byte-level vocabularies write for each byte: itself, if it can be seen."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [code for code in range(256) if code not in seen]
    letters = {code: chr(code) for code in seen}
    return letters | {code: chr(256 + i) for i, code in enumerate(hidden)}


def _declared(part: Any) -> dict[str, Any]:
    """A part of the tokenizer as it stands in tokenizer.json; empty for None."""
    found: dict[str, Any] = {} if part is None else json.loads(part.__getstate__())
    return found


def _flat(step: dict[str, Any], members: str) -> Iterator[dict[str, Any]]:
    if step.get("type") == "Sequence":
        for member in step[members]:
            yield from _flat(member, members)
    elif step:
        yield step


def _unsupported(path: Path, step: dict[str, Any]) -> TokenizerError:
    return TokenizerError(
        f"{path}: decoder {step['type']} is not supported; supported are those of Llama models: "
        "ByteLevel, Metaspace and Replace with ByteFallback, Fuse and Strip"
    )
