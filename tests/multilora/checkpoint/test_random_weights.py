"""An engine of random weights, and what it needs beside them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from multilora.adapters.random_adapter import random_adapter
from multilora.config.engine import EngineConfig
from multilora.engine.engine import Engine
from multilora.errors import ConfigError
from tests.harness.model_folders import TINY, write_checkpoint
from tests.harness.tiny_engines import SETTINGS, Job, greedy, prompt_of, run


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


def test_a_shape_has_no_tokenizer() -> None:
    with pytest.raises(ConfigError, match="give tokenizer=FOLDER, or skip_tokenizer_init"):
        Engine(EngineConfig(model="llama-3.2-1b:1", load_format="dummy"))
