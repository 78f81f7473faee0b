"""Tiny engines, and requests run through them to the end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from multilora.config.engine import EngineConfig
from multilora.engine.engine import Engine
from multilora.sampling_params import SamplingParams

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    from multilora.outputs import RequestOutput

SETTINGS = {
    "skip_tokenizer_init": True,
    "max_model_len": 256,
    "num_kv_blocks": 64,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 64,
    "max_loras": 4,
}


@dataclass(frozen=True)
class Job:
    """One request: what `Engine.add_request` takes."""

    prompt: tuple[int, ...]
    params: SamplingParams
    adapter: str | Mapping[str, float] | None = None


def make_engine(
    base: Path,
    adapters: Mapping[str, Path] | None = None,
    resolver: Callable[[str], Path | None] | None = None,
    **settings: Any,  # fields of EngineConfig, whose defaults are `SETTINGS`
) -> Engine:
    """An engine of the checkpoint in `base` with these adapters loaded."""
    config = EngineConfig(**{"model": str(base), **SETTINGS, **settings})
    engine = Engine(config, resolver=resolver)
    for name, folder in (adapters or {}).items():
        engine.load_adapter(name, folder)
    return engine


def prompt_of(length: int, *, seed: int = 0, vocab: int = 128) -> tuple[int, ...]:
    """Random token ids, without the special ones below 3."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(3, vocab, (length,), generator=generator).tolist())


def greedy(max_tokens: int = 8, **fields: Any) -> SamplingParams:
    """Greedy sampling of exactly `max_tokens` tokens, unless `fields` say otherwise."""
    return SamplingParams(
        **{"temperature": 0, "max_tokens": max_tokens, "ignore_eos": True, **fields}
    )


def drain(engine: Engine) -> dict[str, RequestOutput]:
    """Steps until nothing is left, checking the engine after each; the finished by request id."""
    finished = {}
    while engine.has_work:
        for output in engine.step():
            if output.finished:
                finished[output.request_id] = output
        engine.check_integrity()
    return finished


def add(engine: Engine, job: Job) -> str:
    """Queues a job; its request id."""
    return engine.add_request(job.prompt, job.params, adapter=job.adapter)


def run(engine: Engine, jobs: Iterable[Job]) -> list[RequestOutput]:
    """What comes of the jobs when all are queued at once, in their order."""
    ids = [add(engine, job) for job in jobs]
    finished = drain(engine)
    return [finished[i] for i in ids]


def facts(output: RequestOutput) -> tuple[Any, ...]:
    """All that a request's neighbours must not change, exact to the last bit."""
    answers = [
        (a.index, a.text, a.token_ids, a.logprobs, a.cumulative_logprob, a.finish_reason)
        for a in output.outputs
    ]
    return output.prompt_logprobs, answers
