"""The work of the benches: counts that the floor rests on, files, prompts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from models import write_all
from safetensors.torch import load_file
from work import SHAPES, Work, adapters_of, prompts, rank_of


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


def test_the_work_of_the_figures_is_what_it_says() -> None:
    shape = SHAPES["132m"]
    norms = (2 * shape.layers + 1) * shape.hidden
    assert round((shape.body + 2 * shape.head + norms) / 1e6) == 132
    llama = SHAPES["1b"]
    norms = (2 * llama.layers + 1) * llama.hidden
    assert llama.body + llama.head + norms == 1_235_814_400  # as published


def test_files_that_are_there_stay(tiny: Work) -> None:
    before = (tiny.base / "model.safetensors").stat().st_mtime_ns
    write_all(tiny)
    assert (tiny.base / "model.safetensors").stat().st_mtime_ns == before


def test_every_token_is_one_word(tiny: Work) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tiny.base / "tokenizer.json"))
    ids = prompts(1, 40, tiny.shape.vocab)[0]
    assert tokenizer.encode(" ".join(f"w{i}" for i in ids)).ids == ids


def test_prompts_do_not_depend_on_their_number() -> None:
    assert prompts(2, 8, 100) == prompts(16, 8, 100)[:2]
    assert all(3 <= token < 100 for row in prompts(4, 50, 100) for token in row)


def test_cases_choose_adapters() -> None:
    assert adapters_of("base", 2) == [None, None]
    assert len(set(adapters_of("identical", 16))) == 1
    assert sorted(adapters_of("distinct", 16)) == list(range(16))  # type: ignore[type-var]


def test_configs_are_json_that_the_reader_takes(tiny: Work, tmp_path: Path) -> None:
    from multilora.config.model import ModelConfig

    for name, shape in SHAPES.items():
        from models import hf_config

        (tmp_path / "config.json").write_text(json.dumps(hf_config(shape)))
        config = ModelConfig.from_dir(tmp_path)
        assert (config.hidden_size, config.tie_word_embeddings) == (shape.hidden, shape.tied), name
        assert config.rope_scaling is not None
