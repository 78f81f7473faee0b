"""Reads Llama 2's sentencepiece `tokenizer.model`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .folder_tokenizer import BRACKETED, FolderTokenizer, unreadable
from .settings import Settings
from .vocabulary import AddedToken

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SPACE = "\u2581"  # how pieces write a space
# In the file: the field of pieces, and in a piece its text and its kind.
PIECES, TEXT, KIND = 1, 1, 3
CONTROL, USER_DEFINED = 3, 4
ODD = "\u2460\ufb01e\u0301\x07\u200b"  # what normalizers would change


class SentencePieceTokenizer(FolderTokenizer):
    """Each text between added tokens is encoded on its own, with the model's space before it.

    As Meta's code and Hugging Face's first converters do.
    """

    def __init__(self, path: Path) -> None:
        import sentencepiece

        self._model = model = sentencepiece.SentencePieceProcessor()
        try:
            proto = bytearray(path.read_bytes())
            loaded = model.LoadFromSerializedProto(bytes(proto))
            structure = _hide_structure(proto)
            if structure:
                model.LoadFromSerializedProto(bytes(proto))
        except (OSError, RuntimeError, IndexError) as error:
            raise unreadable(path, str(error)) from error
        if not loaded or not model.GetPieceSize():
            raise unreadable(path, "it holds no pieces")
        table, own = self._read_pieces()
        own |= {i: AddedToken(own[i].content) for i in structure}
        super().__init__(
            settings := Settings(path.parent),
            table,
            own,
            pieces={model.IdToPiece(i): i for i in table},
            strip_space=self._strips_space(),
            keeps_all_text=model.Normalize(ODD).endswith(ODD) and any(map(model.IsByte, table)),
        )
        if settings.config.get("add_bos_token", True) and self.bos_token_id is not None:
            self._prefix = [self.bos_token_id]
        eos = settings.named_id(self._vocabulary, "eos_token")
        if settings.config.get("add_eos_token") and eos is not None:
            self._suffix = [eos]

    def _encode_plain(self, text: str, *, first: bool) -> list[int]:
        ids: list[int] = self._model.EncodeAsIds(text)
        return ids

    def _read_pieces(self) -> tuple[dict[int, bytes], dict[int, AddedToken]]:
        """The bytes of the pieces, and the control tokens."""
        model = self._model
        table: dict[int, bytes] = {}
        own: dict[int, AddedToken] = {}
        for i in range(model.GetPieceSize()):
            piece = model.IdToPiece(i)
            if model.IsControl(i) or model.IsUnknown(i):
                own[i] = AddedToken(piece, special=True)
            elif model.IsByte(i):
                table[i] = bytes([int(piece[3:5], 16)])
            else:
                table[i] = piece.replace(SPACE, " ").encode()
        return table, own

    def _strips_space(self) -> bool:
        """Whether decoding takes away the space that encoding puts before a text.

        Tried with a piece of one space and more: of two spaces, one stays.
        """
        pieces = map(self._model.IdToPiece, range(self._model.GetPieceSize()))
        for i, piece in enumerate(pieces):
            if piece.startswith(SPACE) and piece.count(SPACE) == 1 and len(piece) > 1:
                return not self._model.DecodeIds([i]).startswith(" ")
        return False


def _hide_structure(proto: bytearray) -> set[int]:
    """Ids of pieces in brackets that the model would find in any text; now it finds them in none.

    Pieces that are "user defined" become "control", as a trainer may make them as well. What the
    file says of them stands in no function of the library.
    """
    hidden: set[int] = set()
    pieces = (field for field in _fields(proto, 0, len(proto)) if field[0] == PIECES)
    for i, (_, start, end) in enumerate(pieces):
        found = {number: (at, stop) for number, at, stop in _fields(proto, start, end)}
        kind, _ = found.get(KIND, (0, 0))
        if kind and proto[kind] == USER_DEFINED:
            text = proto[slice(*found[TEXT])].decode("utf-8", "replace")
            if BRACKETED.fullmatch(text):
                proto[kind] = CONTROL
                hidden.add(i)
    return hidden


def _fields(data: bytearray, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Number, start and end of each field of a protocol buffer that lies in data[at:end]."""
    while at < end:
        key, at = _number(data, at)
        if key & 7 == 2:
            size, at = _number(data, at)
        elif key & 7 == 0:
            size = _number(data, at)[1] - at
        else:
            size = 4 if key & 7 == 5 else 8
        yield key >> 3, at, at + size
        at += size


def _number(data: bytearray, at: int) -> tuple[int, int]:
    """A number of seven bits to a byte, the lowest first, and where it ends."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
