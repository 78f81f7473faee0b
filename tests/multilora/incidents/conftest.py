"""A checkpoint, four adapters, and what a request answers on an engine of its own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

from tests.harness.adapter_folders import write_adapter
from tests.harness.model_folders import TINY, write_checkpoint
from tests.harness.tiny_engines import Job, facts, make_engine, prompt_of, run
from tests.harness.tiny_engines import greedy as greedy_params

if TYPE_CHECKING:
    from pathlib import Path

    from multilora.engine.engine import Engine

TARGETS: dict[str, dict[str, Any]] = {
    "a": {"rank": 8},
    "b": {"rank": 16},
    "c": {"rank": 24, "targets": ("k_proj", "v_proj", "down_proj", "lm_head")},
    "narrow": {"rank": 4, "targets": ("q_proj",)},
}


@dataclass
class World:
    """Where they lie; `alone` remembers its answers."""

    root: Path
    answers: dict[str, Any] = field(default_factory=dict)

    def engine(self, *names: str, **settings: Any) -> Engine:
        """An engine with these adapters loaded."""
        return make_engine(self.root / "base", {n: self.root / n for n in names}, **settings)

    def job(self, adapter: Any = None, length: int = 40, count: int = 6, seed: int = 0) -> Job:
        """A greedy request that tells its log-probabilities."""
        return Job(prompt_of(length, seed=seed), greedy_params(count, logprobs=2), adapter)

    def alone(self, job: Job) -> Any:
        """What a request answers in an engine where nothing else ever was."""
        if repr(job) not in self.answers:
            names = [job.adapter] if isinstance(job.adapter, str) else list(job.adapter or ())
            engine = self.engine(*names, enforce_eager=True, enable_prefix_caching=False)
            self.answers[repr(job)] = facts(run(engine, [job])[0])
        return self.answers[repr(job)]

    def check(self, engine: Engine, jobs: list[Job]) -> None:
        """Queues them all at once: each must answer as it does alone."""
        for job, output in zip(jobs, run(engine, jobs), strict=True):
            assert facts(output) == self.alone(job), job.adapter


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("incidents")
    write_checkpoint(root / "base")
    for seed, (name, fields) in enumerate(TARGETS.items()):
        write_adapter(root / name, TINY, seed=seed, scale=0.3, **fields)
    return World(root)
