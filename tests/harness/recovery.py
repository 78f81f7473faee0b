"""Engines that are disturbed, and what each request gives on an engine of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from multilora.sampling_params import SamplingParams
from tests.harness.tiny_engines import Job, facts, make_engine, prompt_of, run

if TYPE_CHECKING:
    from pathlib import Path

    from multilora.engine.engine import Engine

NAMES = ("a", "b")
FORMS = {
    "eager": {"enforce_eager": True},
    "captured": {},
    "async": {"async_scheduling": True},
}
SETTINGS = {
    "block_size": 8,
    "num_kv_blocks": 12,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 16,
    "max_loras": 1,
    "lora_pages": 2,
}


def sampled(max_tokens: int, **fields: Any) -> SamplingParams:
    return SamplingParams(
        **{
            "temperature": 1.0,
            "seed": 3,
            "max_tokens": max_tokens,
            "ignore_eos": True,
            "logprobs": 1,
            "repetition_penalty": 1.1,
            **fields,
        }
    )


SHORT, LONG = prompt_of(5, seed=4), prompt_of(40, seed=5)


@dataclass
class World:
    root: Path
    alone: dict[Job, Any]

    def engine(self, form: str) -> Engine:
        folders = {name: self.root / name for name in NAMES}
        return make_engine(self.root / "base", folders, **SETTINGS, **FORMS[form])

    def facts(self, job: Job) -> Any:
        """What the job gives on an engine of its own."""
        key = repr(job)
        if key not in self.alone:
            self.alone[key] = facts(run(self.engine("eager"), [job])[0])
        return self.alone[key]
