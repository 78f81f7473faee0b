"""Streams of the asynchronous engine: the bits of the step-wise one, whatever goes on beside."""

from __future__ import annotations

import asyncio
import random
import threading
from typing import TYPE_CHECKING, Any

import pytest

from multilora import LoRARequest, RequestOutputKind
from multilora.errors import (
    AdapterInvalid,
    AdapterNotFound,
    CapacityError,
    ConfigError,
    EngineClosedError,
    EngineFullError,
    RequestError,
)
from tests.harness.streams import answer, is_clean, joined, read
from tests.harness.tiny_engines import Job, facts, prompt_of
from tests.multilora.serving.conftest import KINDS, NAMES, House, jobs_of, sampled

if TYPE_CHECKING:
    from pathlib import Path

    from multilora import AsyncEngine, Engine
    from multilora.engine.adapter_reader import AdapterReader

LONG = Job(prompt_of(8), sampled(200, output_kind=RequestOutputKind.DELTA))


# Answers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [{}, {"async_scheduling": True}, {"num_kv_blocks": 40}], ids=str
)
def test_sixteen_streams_over_eight_adapters_are_the_step_wise_engines(
    house: House, settings: dict[str, Any]
) -> None:
    jobs = jobs_of(16)

    async def main() -> list[Any]:
        async with house.door(**settings) as engine:
            for name in NAMES[:4]:
                await engine.load_adapter(name, house.root / name)
            for name in NAMES[4:]:
                await engine.register_adapter(name, house.root / name)
            found = await asyncio.gather(*(answer(engine, job) for job in jobs))
            await is_clean(engine)
            return list(found)

    assert asyncio.run(main()) == [house.facts(job) for job in jobs]


@pytest.mark.seconds
def test_loads_replacements_and_unloads_in_traffic_change_no_stream(house: House) -> None:
    """A name means what it meant when its request came: either content, never a mixture."""
    jobs = jobs_of(16)

    async def churn(engine: AsyncEngine, done: asyncio.Event) -> int:
        """Gives one name, that nobody of the jobs uses, other contents all the time."""
        chance, count = random.Random(0), 0
        while not done.is_set():
            folder = house.root / chance.choice(NAMES)
            await engine.load_adapter("changing", folder)
            expected = house.facts(Job(LONG.prompt, sampled(4), folder.name))
            assert await answer(engine, Job(LONG.prompt, sampled(4), "changing")) == expected
            for name in NAMES[:2]:  # again what they are
                await engine.load_adapter(name, house.root / name)
            await engine.unload_adapter("changing")
            with pytest.raises(AdapterNotFound):
                await engine.unload_adapter("changing")
            count += 1
        return count

    async def main() -> tuple[list[list[Any]], int]:
        async with house.door(max_num_seqs=17) as engine:
            for name in NAMES:
                await engine.load_adapter(name, house.root / name)
            done = asyncio.Event()
            churning = asyncio.create_task(churn(engine, done))
            rounds = [
                list(await asyncio.gather(*(answer(engine, job) for job in jobs))) for _ in range(4)
            ]
            done.set()
            count = await churning
            await is_clean(engine)
            return rounds, count

    for job in jobs:
        house.facts(job)
    for name in NAMES:
        house.facts(Job(LONG.prompt, sampled(4), name))
    rounds, count = asyncio.run(main())
    assert count > 1
    assert rounds == [[house.facts(job) for job in jobs]] * 4


def test_a_replaced_adapter_serves_new_requests_and_the_old_one_those_in_flight(
    house: House,
) -> None:
    job = Job(LONG.prompt, sampled(60, output_kind=RequestOutputKind.DELTA), "x")

    async def main() -> list[Any]:
        async with house.door() as engine:
            await engine.load_adapter("x", house.root / "a0")
            stream = engine.generate(job.prompt, job.params, adapter="x")
            old = [await anext(stream)]
            await engine.load_adapter("x", house.root / "a1")
            new = await answer(engine, job)
            old += [output async for output in stream]
            return [facts(joined(old)), new]

    expected = [house.facts(Job(job.prompt, job.params, name)) for name in ("a0", "a1")]
    assert asyncio.run(main()) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_come_as_their_kind_says(house: House, kind: RequestOutputKind) -> None:
    job = Job(LONG.prompt, sampled(5, output_kind=kind, logprobs=1))

    async def main() -> Any:
        async with house.door() as engine:
            return await read(engine, job)

    outputs = asyncio.run(main())
    told = [(o.outputs[0].token_offset, len(o.outputs[0].token_ids)) for o in outputs]
    if kind is RequestOutputKind.DELTA:
        ends = [offset + count for offset, count in told]
        assert ([offset for offset, _ in told], ends[-1]) == ([0, *ends[:-1]], 5)
    else:
        assert {offset for offset, _ in told} == {0}
        assert told[-1] == (0, 5)
        assert len(told) == 1 or kind is RequestOutputKind.CUMULATIVE


@pytest.mark.parametrize(("source", "count"), [("auto", 4), ("vllm", 16)])
def test_without_parameters_the_models_own_hold(house: House, source: str, count: int) -> None:
    async def main() -> int:
        async with house.door(generation_config=source) as engine:
            last = [output async for output in engine.generate([5, 6, 7])][-1]
            return len(last.outputs[0].token_ids)

    own = house.root / "base" / "generation_config.json"
    own.write_text('{"max_new_tokens": 4}')
    assert asyncio.run(main()) == count
    own.unlink()


def test_a_lora_request_is_registered_once_and_read_beside_the_steps(house: House) -> None:
    job = Job(LONG.prompt, sampled(6), "a2")
    request = LoRARequest("mine", 1, str(house.root / "a2"))

    async def main() -> Any:
        async with house.door() as engine:

            async def ask(request: LoRARequest) -> Any:
                stream = engine.generate(job.prompt, job.params, lora_request=request)
                found = [output async for output in stream]
                assert all(output.lora_request is request for output in found)
                return facts(found[-1])

            both = await asyncio.gather(ask(request), ask(request))
            assert (await engine.get_stats()).adapter_loads == 1
            again = LoRARequest("mine", 1, str(house.root / "a3"))
            other = await ask(again)
            assert (await engine.get_stats()).adapter_loads == 2
            assert (await engine.list_registered_adapters())["mine"].path == again.path
            await engine.unload_adapter("mine")
            assert await ask(again) == other
            return [*both, other]

    mine, other = house.facts(job), house.facts(Job(job.prompt, job.params, "a3"))
    assert asyncio.run(main()) == [mine, mine, other]


# Errors -------------------------------------------------------------------------------------------


def test_what_is_wrong_is_raised_by_the_first_output(house: House) -> None:
    async def first(engine: AsyncEngine, *args: Any, **given: Any) -> Any:
        return await anext(engine.generate(*args, **given))

    async def main() -> None:
        async with house.door() as engine:
            for error, args, given in (
                (RequestError, (None,), {}),
                (RequestError, ([5], "no parameters"), {}),
                (RequestError, ([5],), {"lora_request": "x"}),
                (RequestError, ([5],), {"lora_request": LoRARequest("x", 1, "y"), "adapter": "x"}),
                (RequestError, ([5], None, 7), {}),
                (CapacityError, ([5] * 300, sampled()), {}),
                (AdapterNotFound, ([5],), {"adapter": "nobody"}),
            ):
                with pytest.raises(error):
                    await first(engine, *args, **given)
            with pytest.raises(AdapterInvalid):
                await engine.load_adapter("x", house.root / "nothing")
            with pytest.raises(AdapterInvalid):
                await engine.load_adapter_from_tensors("x", {}, {})
            with pytest.raises(RequestError, match="timeout"):
                await engine.drain("soon")  # type: ignore[arg-type]
            assert await engine.abort(["x"]) is False  # type: ignore[arg-type]
            await engine.check_health()
            await is_clean(engine)

    asyncio.run(main())


@pytest.mark.parametrize("limit", [-1, 1.5, None, "x"])
def test_a_bound_that_is_none_is_refused(house: House, limit: Any) -> None:
    with pytest.raises(ConfigError, match="max_waiting must be a count"):
        house.door(limit)


def test_who_comes_beyond_the_bound_is_told_at_once(house: House) -> None:
    async def main() -> None:
        async with house.door(max_waiting=2, max_num_seqs=3) as engine:
            streams = [engine.generate(LONG.prompt, LONG.params) for _ in range(5)]
            waiting = [asyncio.create_task(anext(stream)) for stream in streams]
            await asyncio.sleep(0)
            assert engine.num_requests == 5
            with pytest.raises(EngineFullError, match=r"send it again .* a larger max_waiting"):
                await anext(engine.generate([5], sampled()))
            await waiting[0]
            await streams[0].aclose()
            while engine.num_requests == 5:  # a step or two
                await asyncio.sleep(0.001)
            assert (await read(engine, Job((5,), sampled(2))))[-1].finished
            for task, stream in zip(waiting, streams, strict=True):
                await task if not task.cancelled() else None
                await stream.aclose()
            await until_empty(engine)
            await is_clean(engine)

    asyncio.run(main())


async def until_empty(engine: AsyncEngine) -> None:
    for _ in range(2000):
        if not engine.num_requests and not await engine.call(lambda inner: inner.has_work):
            return
        await asyncio.sleep(0.002)
    raise AssertionError("requests are left")


# Ends ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_an_aborted_stream_ends_with_all_that_was_computed(
    house: House, kind: RequestOutputKind
) -> None:
    params = sampled(200, output_kind=kind, n=2, logprobs=1, stream_interval=7)

    async def main() -> tuple[Any, int]:
        async with house.door() as engine:
            outputs = []

            async def follow() -> None:
                stream = engine.generate(LONG.prompt, params, "mine")
                outputs.extend([output async for output in stream])

            task = asyncio.create_task(follow())
            while (await engine.get_stats()).generated_tokens < 40:
                await asyncio.sleep(0.001)

            def end(inner: Engine) -> list[list[int]]:
                return [answer.token_ids for answer in inner.output("mine").outputs]

            before = await engine.call(end)
            assert await engine.abort("mine")
            assert not await engine.abort("mine")
            await task
            await is_clean(engine)
            return outputs, before

    outputs, before = asyncio.run(main())
    found = joined(outputs) if kind is RequestOutputKind.DELTA else outputs[-1]
    assert found.finished
    assert [answer.finish_reason for answer in found.outputs] == ["abort"] * 2
    _, alone = house.facts(Job(LONG.prompt, params))
    for answer_, known, (_, text, ids, logprobs, *_) in zip(
        found.outputs, before, alone, strict=True
    ):
        count = len(answer_.token_ids)
        assert count >= len(known) > 10
        assert answer_.token_ids == ids[:count]
        assert answer_.logprobs == logprobs[:count]
        assert text.startswith(answer_.text)


def test_drained_it_takes_nobody_and_lets_the_others_finish(house: House) -> None:
    async def main() -> None:
        async with house.door() as engine:
            streams = [asyncio.create_task(answer(engine, LONG)) for _ in range(4)]
            await asyncio.sleep(0)
            assert not await engine.drain(0.0)
            with pytest.raises(EngineClosedError, match="is being drained"):
                await read(engine, LONG)
            with pytest.raises(EngineClosedError, match="is being drained"):
                await engine.check_health()
            assert await engine.drain()
            assert await asyncio.gather(*streams) == [house.facts(LONG)] * 4
            await is_clean(engine)

    house.facts(LONG)
    asyncio.run(main())


def test_shut_down_it_tells_everyone_and_can_be_again(house: House) -> None:
    async def main() -> None:
        engine = house.door()
        stream = engine.generate(LONG.prompt, LONG.params)
        await anext(stream)
        waits = asyncio.create_task(read(engine, LONG))
        await asyncio.sleep(0)
        await engine.shutdown()
        await engine.shutdown()
        with pytest.raises(EngineClosedError, match="was shut down"):
            _ = [output async for output in stream]
        with pytest.raises(EngineClosedError, match="was shut down"):
            await waits
        for call in (
            lambda: read(engine, LONG),
            engine.get_stats,
            engine.check_health,
            engine.drain,
            lambda: engine.load_adapter("x", house.root / "a0"),
        ):
            with pytest.raises(EngineClosedError):
                await call()
        await stream.aclose()

    asyncio.run(main())


def test_loads_that_wait_for_their_turn_are_told_of_a_shutdown(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()

    async def main() -> None:
        engine = house.door()
        read_folder = engine._reader.read_folder

        def late(name: str, path: Path) -> Any:
            assert gate.wait(20)
            return read_folder(name, path)

        monkeypatch.setattr(engine._reader, "read_folder", late)
        loads = [asyncio.create_task(engine.load_adapter(n, house.root / n)) for n in NAMES[:3]]
        await asyncio.sleep(0)
        await engine.shutdown()
        gate.set()
        for load in loads:
            with pytest.raises(EngineClosedError):
                await load

    asyncio.run(main())


# Loads --------------------------------------------------------------------------------------------


def test_streams_go_on_while_an_adapter_is_read(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()

    async def main() -> None:
        async with house.door() as engine:
            reader: AdapterReader = engine._reader
            read_folder, read_tensors = reader.read_folder, reader.read_tensors

            def late(name: str, path: Path) -> Any:
                assert gate.wait(20)
                return read_folder(name, path)

            def late_tensors(*args: Any) -> Any:
                assert gate.wait(20)
                return read_tensors(*args)

            monkeypatch.setattr(reader, "read_folder", late)
            monkeypatch.setattr(reader, "read_tensors", late_tensors)
            load = asyncio.create_task(engine.load_adapter("x", house.root / "a0"))
            given = house.tensors("a1")
            other = asyncio.create_task(engine.load_adapter_from_tensors("y", *given))
            await asyncio.sleep(0)
            assert await answer(engine, LONG) == house.facts(LONG)
            assert await engine.list_adapters() == {}
            gate.set()
            await asyncio.gather(load, other)
            assert sorted(await engine.list_adapters()) == ["x", "y"]
            for ours, theirs in (("x", "a0"), ("y", "a1")):
                job = Job(LONG.prompt, sampled(5), ours)
                assert await answer(engine, job) == house.facts(Job(job.prompt, job.params, theirs))

    asyncio.run(main())
