"""Random models and adapters of published shapes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from multilora.adapters.random_adapter import random_adapter
from multilora.config.engine import EngineConfig
from multilora.config.lora_sites import sites_of
from multilora.config.presets import SHAPES, shape_of
from multilora.engine.engine import Engine
from multilora.errors import CheckpointError, ConfigError
from tests.harness.model_folders import TINY, write_checkpoint
from tests.harness.tiny_engines import SETTINGS, Job, greedy, prompt_of, run


def weights(name: str) -> int:
    config = SHAPES[name]
    linears = sum(site.layers * site.in_ * site.out for site in sites_of(config).values())
    norms = (2 * config.num_layers + 1) * config.hidden_size
    head = config.vocab_size * config.hidden_size if config.tie_word_embeddings else 0
    return linears + norms - head


def test_the_shapes_have_as_many_weights_as_published() -> None:
    assert weights("llama-3.1-8b") == 8_030_261_248
    assert weights("llama-3.1-70b") == 70_553_706_496
    assert weights("llama-3.2-1b") == 1_235_814_400


def test_a_shape_can_have_fewer_layers() -> None:
    assert shape_of("llama-3.1-70b:2").num_layers == 2
    assert shape_of("llama-3.1-70b").num_layers == 80
    for wrong in ("llama-3.1-70b:", "llama-3.1-70b:x", "llama-3.1-70b:0", "llama-9"):
        with pytest.raises(CheckpointError, match="load_format='dummy'"):
            shape_of(wrong)


def test_an_engine_of_random_weights_answers_with_random_adapters(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()  # the config alone is read
    engines = [
        Engine(EngineConfig(model=str(tmp_path), load_format="dummy", seed=seed, **SETTINGS))
        for seed in (0, 0, 1)
    ]
    answers = []
    for engine in engines:
        for rank in (8, 16):
            adapter = random_adapter(TINY, rank, seed=rank)
            engine.store.load(f"r{rank}", adapter)
        jobs = [Job(prompt_of(20), greedy(), name) for name in (None, "r8", "r16")]
        answers.append([output.outputs[0].token_ids for output in run(engine, jobs)])
    assert answers[0] == answers[1] != answers[2]
    assert len({tuple(ids) for ids in answers[0]}) == 3
    assert all(torch.isfinite(p).all() for p in engines[0].model.parameters())


def test_adapters_differ_by_seed_and_rank_and_name_their_content() -> None:
    digests = [random_adapter(TINY, r, s).digest for r, s in ((8, 0), (8, 1), (16, 0), (8, 0))]
    assert len(set(digests)) == 3
    assert digests[0] == digests[3]
    assert random_adapter(TINY, 8, 0, sites=("o",)).rank_at("qkv") == 0


def test_a_shape_has_no_tokenizer() -> None:
    with pytest.raises(ConfigError, match="give tokenizer=FOLDER, or skip_tokenizer_init"):
        Engine(EngineConfig(model="llama-3.2-1b:1", load_format="dummy"))


def test_an_unknown_load_format_is_refused() -> None:
    with pytest.raises(ConfigError, match="load_format must be one of auto, dummy"):
        EngineConfig(model="x", load_format="gguf")
