"""Whatever a caller gives, it works or is refused by an error of ours, and costs nobody a bit."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

import pytest

from multilora import MultiloraError, RequestOutputKind
from tests.harness.hostile_values import ATOMS, made
from tests.harness.streams import answer, is_clean
from tests.harness.tiny_engines import Job, prompt_of
from tests.multilora.serving.conftest import House, sampled

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from multilora import AsyncEngine

NEIGHBOUR = Job(
    prompt_of(8), sampled(4, logprobs=1, output_kind=RequestOutputKind.DELTA), "neighbour"
)


async def _generate(engine: AsyncEngine, **given: Any) -> None:
    async for output in engine.generate(**given):
        assert output.outputs[0].token_ids or output.error


CALLS: dict[str, tuple[Callable[..., Awaitable[Any]], dict[str, Any]]] = {
    "generate": (
        _generate,
        {
            "prompt": [5, 6],
            "sampling_params": sampled(2),
            "request_id": None,
            "adapter": None,
            "lora_request": None,
        },
    ),
    "abort": (lambda engine, **given: engine.abort(**given), {"request_id": "x"}),
    "load_adapter": (
        lambda engine, **given: engine.load_adapter(**given),
        {"name": "c", "path": "/nonexistent"},
    ),
    "load_adapter_from_tensors": (
        lambda engine, **given: engine.load_adapter_from_tensors(**given),
        {"name": "c", "config": {}, "tensors": {}},
    ),
    "register_adapter": (
        lambda engine, **given: engine.register_adapter(**given),
        {"name": "c", "path": "/nonexistent", "digest": None},
    ),
    "unload_adapter": (lambda engine, **given: engine.unload_adapter(**given), {"name": "c"}),
}


@pytest.mark.seconds
@pytest.mark.parametrize("name", CALLS)
def test_each_hostile_value_of_each_call_works_or_is_refused(house: House, name: str) -> None:
    call, known = CALLS[name]

    async def main() -> None:
        async with house.door() as engine:
            await engine.load_adapter("neighbour", house.root / "a0")
            for argument in known:
                for text in ATOMS:
                    with contextlib.suppress(MultiloraError):
                        await asyncio.wait_for(call(engine, **{**known, argument: made(text)}), 30)
                assert await answer(engine, NEIGHBOUR) == expected
                await is_clean(engine)

    expected = house.facts(Job(NEIGHBOUR.prompt, NEIGHBOUR.params, "a0"))
    asyncio.run(main())


def test_a_drain_takes_seconds(house: House) -> None:
    async def main() -> None:
        for text in ATOMS:
            async with house.door() as engine:
                with contextlib.suppress(MultiloraError):
                    await asyncio.wait_for(engine.drain(made(text)), 5)

    asyncio.run(main())
