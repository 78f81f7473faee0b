"""What a tokenizer.json asks for: decoders, added tokens."""

from __future__ import annotations

import json

import pytest

from multilora.errors import TokenizerError
from multilora.tokenization.tokenizer import (
    load_tokenizer,
)
from tests.harness.tokenizer_folders import copy_files, oracle_of


def test_decoder_without_a_byte_table_is_refused(tmp_path):
    folder = copy_files(tmp_path, "tokenizer.json")
    raw = json.loads((folder / "tokenizer.json").read_text())
    raw["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(TokenizerError, match="decoder WordPiece is not supported"):
        load_tokenizer(folder)


def test_special_tokens_that_take_spaces_are_parsed_as_transformers_does(tmp_path):
    folder = copy_files(tmp_path, "tokenizer.json")
    raw = json.loads((folder / "tokenizer.json").read_text())
    raw["added_tokens"][9] |= {"lstrip": True, "rstrip": True}
    raw["added_tokens"][8] |= {"single_word": True}
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    reader, oracle = load_tokenizer(folder), oracle_of(folder)
    for text in ("a  <|eot_id|> \n b", "<|eot_id|>", "x<|eom_id|> y <|eom_id|> z"):
        assert reader.encode_with_special(text) == oracle.encode(text, add_special_tokens=False)


def test_truncation_in_the_file_does_not_cut_prompts(tmp_path):
    folder = copy_files(tmp_path, "tokenizer.json")
    raw = json.loads((folder / "tokenizer.json").read_text())
    raw["truncation"] = {
        "direction": "Right",
        "max_length": 4,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    reader = load_tokenizer(folder)
    assert reader.decode(reader.encode("a long prompt of many words")) == (
        "a long prompt of many words"
    )
