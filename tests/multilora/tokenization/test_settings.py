"""What the files beside a tokenizer say: beginnings, ends."""

from __future__ import annotations

import json

import pytest

from multilora.errors import TokenizerError
from multilora.tokenization.tokenizer import (
    load_tokenizer,
)
from tests.harness.tokenizer_folders import copy_files, oracle_of


@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("post_processor", [True, False])
def test_bos_comes_from_the_file_whatever_the_config_says(tmp_path, flag, post_processor):
    folder = copy_files(tmp_path, "tokenizer.json", "tokenizer_config.json")
    raw = json.loads((folder / "tokenizer.json").read_text())
    if not post_processor:
        raw["post_processor"] = None
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "add_bos_token": flag}))
    want = oracle_of(folder).encode("hi")
    assert load_tokenizer(folder).encode("hi") == want
    assert (want[0] == 2816) == post_processor


def test_eos_ids_come_from_every_file(tmp_path):
    folder = copy_files(tmp_path, "tokenizer.json")
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 2825]}')
    (folder / "config.json").write_text('{"eos_token_id": 7}')
    assert load_tokenizer(folder).eos_token_ids == (5, 7, 2817, 2824, 2825)


def test_end_id_outside_the_vocabulary_names_its_file(tmp_path):
    folder = copy_files(tmp_path, "tokenizer.json")
    (folder / "generation_config.json").write_text('{"eos_token_id": [128009]}')
    with pytest.raises(TokenizerError, match=r"generation_config\.json.*128009"):
        load_tokenizer(folder)


def test_unknown_bos_token_is_refused(tmp_path):
    folder = copy_files(tmp_path, "tokenizer.json")
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<start>"}')
    with pytest.raises(TokenizerError, match="bos_token '<start>'"):
        load_tokenizer(folder)
