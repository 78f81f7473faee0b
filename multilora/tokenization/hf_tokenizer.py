"""Reads `tokenizer.json` with Hugging Face's `tokenizers`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import TokenizerError
from .folder_tokenizer import FolderTokenizer
from .hf_vocabulary import keeps_all_text, read_hf_vocabulary, starts_differently
from .settings import Settings

if TYPE_CHECKING:
    from pathlib import Path

    import tokenizers


class HFTokenizer(FolderTokenizer):
    """`tokenizers` cuts plain text; added tokens are found by us, for all kinds of files alike.

    Where transformers 5 rebuilds a Llama tokenizer and ignores the file's Prepend and Replace
    normalizers, this one follows the file, as `tokenizers` and transformers 4 do.
    """

    def __init__(self, path: Path) -> None:
        import tokenizers

        try:
            self._hf: tokenizers.Tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise TokenizerError(
                f"{path} cannot be read as a tokenizer: {error}; fetch the file again"
            ) from error
        self._hf.no_truncation()
        self._hf.no_padding()
        found = read_hf_vocabulary(self._hf, path)
        super().__init__(
            Settings(path.parent),
            found.table,
            found.added,
            pieces=self._hf.get_vocab(with_added_tokens=False),
            strip_space=found.strip_space,
            keeps_all_text=keeps_all_text(self._hf),
        )
        # Set once, before any use: for this object, added tokens in text are plain text.
        self._hf.add_special_tokens(
            [tokenizers.AddedToken(t.content, special=True) for t in found.added.values()]
        )
        self._hf.encode_special_tokens = True
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
