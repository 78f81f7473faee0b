"""Streams of the asynchronous engine, read to their ends."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from multilora.sampling_params import RequestOutputKind
from tests.harness.tiny_engines import Job, facts

if TYPE_CHECKING:
    from collections.abc import Iterable

    from multilora import AsyncEngine, RequestOutput


def joined(outputs: Iterable[RequestOutput]) -> RequestOutput:
    """Deltas as the cumulative output that they tell; each must begin where the last one ended."""
    first, *others = outputs
    answers = {answer.index: answer for answer in first.outputs}
    last = first
    for last in others:
        assert not last.prompt_logprobs
        for new in last.outputs:
            old = answers.get(new.index)
            if old is None:
                assert new.token_offset == 0
                answers[new.index] = new
                continue
            assert new.token_offset == len(old.token_ids)
            answers[new.index] = replace(
                new,
                text=old.text + new.text,
                token_ids=old.token_ids + new.token_ids,
                logprobs=None if new.logprobs is None else [*(old.logprobs or []), *new.logprobs],
                token_offset=0,
            )
    outputs = [answers[index] for index in sorted(answers)]
    return replace(last, outputs=outputs, prompt_logprobs=first.prompt_logprobs)


async def read(engine: AsyncEngine, job: Job, *, pause: float = 0.0) -> list[RequestOutput]:
    """All outputs of a request, by a reader that is as slow as `pause` says."""
    found = []
    async for output in engine.generate(job.prompt, job.params, adapter=job.adapter):
        found.append(output)
        await asyncio.sleep(pause)
    return found


def whole(job: Job, outputs: list[RequestOutput]) -> RequestOutput:
    """What the outputs of a request tell in the end."""
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    is_delta = job.params.output_kind is RequestOutputKind.DELTA
    return joined(outputs) if is_delta else outputs[-1]


async def answer(engine: AsyncEngine, job: Job, *, pause: float = 0.0) -> Any:
    """The facts of a request, see `facts`."""
    return facts(whole(job, await read(engine, job, pause=pause)))


async def is_clean(engine: AsyncEngine) -> None:
    """Asserts that nothing is left of any request."""

    def check(inner: Any) -> None:
        inner.check_integrity()
        assert (inner.has_work, inner.request_ids, inner.memory()["kv"]) == (False, (), 0)
        inner.store.check_integrity(pins=[], holds=[])

    await engine.call(check)
    assert engine.num_requests == 0
