"""What the tests of the asynchronous engine share: a small model that writes text, and adapters."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pytest
from safetensors.torch import load_file

from multilora import AsyncEngine, Engine, EngineConfig, RequestOutputKind, SamplingParams
from multilora.config.model import ModelConfig
from multilora.tokenization.tokenizer import load_tokenizer
from tests.harness.adapter_folders import write_adapter
from tests.harness.model_folders import write_checkpoint
from tests.harness.paths import UMA
from tests.harness.tiny_engines import Job, facts, prompt_of, run

if TYPE_CHECKING:
    from pathlib import Path

    import torch

NAMES = tuple(f"a{i}" for i in range(8))
SETTINGS: dict[str, Any] = {
    "max_model_len": 256,
    "num_kv_blocks": 128,
    "max_num_seqs": 16,
    "max_num_batched_tokens": 64,
    "max_loras": 4,  # fewer than there are adapters: they take turns
}
KINDS = (RequestOutputKind.DELTA, RequestOutputKind.CUMULATIVE, RequestOutputKind.FINAL_ONLY)


@dataclass
class House:
    """Where the model and the adapters lie, and what each request gives on an engine by itself."""

    root: Path
    engine: Engine  # steps by hand, all adapters loaded
    alone: dict[str, Any]

    def config(self, **settings: Any) -> EngineConfig:
        return EngineConfig(**self.paths, **{**SETTINGS, **settings})

    @property
    def paths(self) -> dict[str, str]:
        return {"model": str(self.root / "base"), "tokenizer": str(UMA / "base")}

    def door(self, max_waiting: int = 4096, **settings: Any) -> AsyncEngine:
        return AsyncEngine(self.config(**settings), max_waiting=max_waiting)

    def tensors(self, name: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """An adapter as a trainer has it: config and tensors."""
        config = json.loads((self.root / name / "adapter_config.json").read_text())
        return config, load_file(self.root / name / "adapter_model.safetensors")

    def facts(self, job: Job) -> Any:
        """What a job gives, step by step, with nobody beside it."""
        whole = replace(job, params=job.params.clone(output_kind=RequestOutputKind.FINAL_ONLY))
        if repr(whole) not in self.alone:
            self.alone[repr(whole)] = facts(run(self.engine, [whole])[0])
        return self.alone[repr(whole)]


@pytest.fixture(scope="session")
def house(tmp_path_factory: pytest.TempPathFactory) -> House:
    root = tmp_path_factory.mktemp("serving")
    vocab = load_tokenizer(UMA / "base").vocab_size
    write_checkpoint(root / "base", vocab_size=vocab, num_layers=1, eos_token_ids=())
    shape = ModelConfig.from_dir(root / "base")
    for seed, name in enumerate(NAMES):
        write_adapter(root / name, shape, rank=8 + 8 * (seed % 3), seed=seed, scale=0.4)
    paths = {"model": str(root / "base"), "tokenizer": str(UMA / "base")}
    engine = Engine(EngineConfig(**paths, **SETTINGS))
    for name in NAMES:
        engine.load_adapter(name, root / name)
    return House(root, engine, {})


def sampled(max_tokens: int = 12, **fields: Any) -> SamplingParams:
    """Sampling of exactly so many tokens, unless `fields` say otherwise."""
    given = {"seed": 3, "max_tokens": max_tokens, "ignore_eos": True, **fields}
    return SamplingParams(**given)


def jobs_of(count: int, **fields: Any) -> list[Job]:
    """Requests that differ in everything, over all adapters, in turn of every kind of output."""
    variety: tuple[dict[str, Any], ...] = (
        {"logprobs": 2},
        {"n": 2, "prompt_logprobs": 1},
        {"stop": ["e", "qu"], "logprobs": 0},
        {"stream_interval": 3},
        {"temperature": 0},
    )
    return [
        Job(
            prompt_of(5 + 3 * i, seed=i, vocab=500),
            sampled(6 + i, output_kind=KINDS[i % 3], **{**variety[i % 5], **fields}),
            NAMES[i % len(NAMES)],
        )
        for i in range(count)
    ]
