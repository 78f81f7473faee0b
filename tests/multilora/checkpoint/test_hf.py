"""Safetensors files and their index: what is refused, and with which file's name."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from multilora.checkpoint.hf import MAX_HEADER_BYTES
from tests.harness import model_folders as make
from tests.harness.checkpoint_loading import (
    assert_same,
    edit_weights,
    loaded,
    refused,
)

Q = "model.layers.0.self_attn.q_proj.weight"


def test_ignores_stored_rotary_frequencies(tmp_path: Path) -> None:
    config = make.write_checkpoint(tmp_path)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_weights(tmp_path, lambda w: w.update({name: torch.ones(8)}))
    assert_same(loaded(tmp_path, config), make.random_weights(config))


@pytest.mark.parametrize(
    "place",
    ["/etc/x.safetensors", "../x.safetensors", "a/x.safetensors", "a\\x.safetensors", "..", "", 3],
)
def test_refuses_an_index_that_leaves_the_folder(tmp_path: Path, place: object) -> None:
    config = make.write_checkpoint(tmp_path / "m", shards=2)
    weights = load_file(tmp_path / "m" / "model-00001-of-00002.safetensors")
    save_file(weights, tmp_path / "x.safetensors")  # there to be found, were it looked for
    index = tmp_path / "m" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"][Q] = place
    index.write_text(json.dumps(content))
    assert f"puts {Q} into {place!r}" in refused(tmp_path / "m", config)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": []}', "[]", "{", '{"weight_map": {}}'])
def test_refuses_a_malformed_index(tmp_path: Path, content: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    assert "model.safetensors.index.json" in refused(tmp_path, make.TINY)


def test_names_a_missing_shard(tmp_path: Path) -> None:
    config = make.write_checkpoint(tmp_path, shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    text = refused(tmp_path, config)
    assert "lacks 1 of the 3 files that its index names: model-00002-of-00003.safetensors" in text


def test_refuses_a_weight_that_lies_in_two_shards(tmp_path: Path) -> None:
    config = make.write_checkpoint(tmp_path, shards=2)
    first, second = sorted(tmp_path.glob("*.safetensors"))
    name = next(iter(load_file(first)))
    save_file(load_file(second) | {name: load_file(first)[name]}, second)
    assert f"{name} is in both" in refused(tmp_path, config)


def test_refuses_a_folder_without_weights(tmp_path: Path) -> None:
    assert "holds no weights" in refused(tmp_path, make.TINY)


def test_refuses_pytorch_model_bin(tmp_path: Path) -> None:
    torch.save(make.random_weights(make.TINY), tmp_path / "pytorch_model.bin")
    assert "convert them to safetensors" in refused(tmp_path, make.TINY)


def test_every_truncation_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    config = make.write_checkpoint(tmp_path)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    cuts = {*range(12), header - 1, header, header + 1, len(whole) // 2, len(whole) - 1}
    for size in sorted(cuts | set(range(0, len(whole), len(whole) // 40))):
        file.write_bytes(whole[:size])
        assert str(file) in refused(tmp_path, config), size


def test_garbage_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    config = make.write_checkpoint(tmp_path)
    file = tmp_path / "model.safetensors"
    for content in (b"\x80\x04" * 100, b"\0" * 100, struct.pack("<Q", 2) + b"[]" + b"x" * 50):
        file.write_bytes(content)
        assert str(file) in refused(tmp_path, config)


def test_refuses_a_header_over_the_limit_before_parsing_it(tmp_path: Path) -> None:
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", MAX_HEADER_BYTES + 1))
        file.truncate(MAX_HEADER_BYTES + 100)  # sparse
    assert f"over the limit of {MAX_HEADER_BYTES}" in refused(tmp_path, make.TINY)
