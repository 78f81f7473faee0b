"""Reads Llama 2's sentencepiece `tokenizer.model`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .folder_tokenizer import FolderTokenizer, unreadable
from .settings import Settings
from .vocabulary import AddedToken

if TYPE_CHECKING:
    from pathlib import Path

SPACE = "\u2581"  # how pieces write a space
ODD = "\u2460\ufb01e\u0301\x07\u200b"  # what normalizers would change


class SentencePieceTokenizer(FolderTokenizer):
    """Each text between added tokens is encoded on its own, with the model's space before it.

    As Meta's code and Hugging Face's first converters do.
    """

    def __init__(self, path: Path) -> None:
        import sentencepiece

        self._model = model = sentencepiece.SentencePieceProcessor()
        try:
            loaded = model.LoadFromSerializedProto(path.read_bytes())
        except (OSError, RuntimeError) as error:
            raise unreadable(path, str(error)) from error
        if not loaded or not model.GetPieceSize():
            raise unreadable(path, "it holds no pieces")
        table, own = self._read_pieces()
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
