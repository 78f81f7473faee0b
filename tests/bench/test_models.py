"""The files of the benches: random models, adapters and a tokenizer of words."""

from __future__ import annotations

import json
from pathlib import Path

import models
import pytest
from models import write_all
from safetensors.torch import load_file
from work import SHAPES, Work, prompts, rank_of

from multilora.config.model import ModelConfig
from tests.harness import model_folders


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Work:
    work = Work("tiny", tmp_path_factory.mktemp("work"))
    write_all(work)
    return work


def test_counts_are_those_of_the_files(tiny: Work) -> None:
    weights = load_file(tiny.base / "model.safetensors")
    linears = sum(w.numel() for name, w in weights.items() if "_proj" in name)
    assert linears == tiny.shape.body
    assert weights["lm_head.weight"].numel() == tiny.shape.head
    for i, path in enumerate(tiny.adapters):
        adapter = load_file(path / "adapter_model.safetensors")
        assert sum(w.numel() for w in adapter.values()) == rank_of(i) * tiny.shape.per_rank


def test_files_that_are_there_stay(tiny: Work) -> None:
    before = (tiny.base / "model.safetensors").stat().st_mtime_ns
    write_all(tiny)
    assert (tiny.base / "model.safetensors").stat().st_mtime_ns == before


def test_every_token_is_one_word(tiny: Work) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tiny.base / "tokenizer.json"))
    ids = prompts(1, 40, tiny.shape.vocab)[0]
    assert tokenizer.encode(" ".join(f"w{i}" for i in ids)).ids == ids


def test_configs_are_json_that_the_reader_takes(tiny: Work, tmp_path: Path) -> None:
    for name, shape in SHAPES.items():
        written = models.config_of(shape)
        fields = {**model_folders.hf_config(written), **models.both_spellings(written)}
        (tmp_path / "config.json").write_text(json.dumps(fields))
        config = ModelConfig.from_dir(tmp_path)
        assert config == written
        assert (config.hidden_size, config.tie_word_embeddings) == (shape.hidden, shape.tied), name
        assert config.rope_scaling is not None


def test_what_was_interrupted_is_written_anew(tmp_path: Path) -> None:
    shape, folder = SHAPES["tiny"], tmp_path / "a0"
    folder.mkdir()
    (folder / "adapter_config.json").touch()
    (tmp_path / "a0.part").mkdir()
    models.write_adapter(folder, shape, 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a0"]
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (rank_of(0), 2 * rank_of(0))


def test_an_adapter_changes_a_few_percent(tiny: Work) -> None:
    base = load_file(tiny.base / "model.safetensors")
    for path in tiny.adapters[:4]:
        adapter = load_file(path / "adapter_model.safetensors")
        for name in ("0.self_attn.q_proj", "1.mlp.down_proj"):
            module = f"model.layers.{name}"
            a, b = (adapter[f"base_model.model.{module}.lora_{x}.weight"] for x in "AB")
            share = (2 * b @ a).norm() / base[f"{module}.weight"].norm()
            assert 0.05 < share < 0.5, (path.name, name)
