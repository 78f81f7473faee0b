"""The engine's thread: readers that leave or sleep, steps that fail, threads that die, forks."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import signal
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest

from multilora import RequestOutputKind
from multilora.errors import (
    EngineBusyError,
    EngineClosedError,
    EngineDeadError,
    MultiloraError,
    RequestError,
)
from multilora.scheduling import policies
from tests.harness.streams import answer, is_clean, joined, read
from tests.harness.tiny_engines import Job, facts, prompt_of
from tests.multilora.serving.conftest import NAMES, House, jobs_of, sampled

if TYPE_CHECKING:
    from collections.abc import Callable

    from multilora import AsyncEngine, Engine

LONG = Job(prompt_of(8), sampled(200, output_kind=RequestOutputKind.DELTA), "a0")
SHORT = Job(prompt_of(8), sampled(5), "a0")


async def with_adapters(engine: AsyncEngine, house: House) -> None:
    for name in NAMES:
        await engine.register_adapter(name, house.root / name)


async def until_empty(engine: AsyncEngine) -> None:
    for _ in range(5000):
        if not engine.num_requests and not await engine.call(lambda inner: inner.has_work):
            return
        await asyncio.sleep(0.002)
    raise AssertionError("requests are left")


def inner_of(engine: AsyncEngine) -> Engine:
    return engine._thread.engine


# Readers that leave -------------------------------------------------------------------------------


@pytest.mark.seconds
def test_a_thousand_disconnects_leave_nothing(house: House) -> None:
    """Before the first token, amid the answer, by cancelling, by closing, by leaving the loop."""
    chance = random.Random(0)

    async def one(engine: AsyncEngine, number: int) -> None:
        job = jobs_of(8)[number % 8]
        stream = engine.generate(job.prompt, LONG.params, adapter=job.adapter)
        count = chance.choice((0, 0, 1, 2, 4))
        if number % 3 == 0:  # its task is cancelled
            task = asyncio.create_task(take(stream, 200))
            await asyncio.sleep(0.002 * count)
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        else:
            await take(stream, count)
            if number % 3 == 1:
                await stream.aclose()

    async def take(stream: Any, count: int) -> None:
        if count:
            async for _ in stream:
                count -= 1
                if not count:
                    break

    async def main() -> None:
        async with house.door(num_kv_blocks=256) as engine:
            await with_adapters(engine, house)
            stays = asyncio.create_task(answer(engine, LONG))
            for start in range(0, 1000, 50):
                await asyncio.gather(*(one(engine, start + i) for i in range(50)))
            assert await stays == house.facts(LONG)
            await until_empty(engine)
            await is_clean(engine)
            assert await answer(engine, SHORT) == house.facts(SHORT)

    house.facts(LONG)
    asyncio.run(main())


def test_a_request_ends_within_two_steps_of_its_readers_leaving(house: House) -> None:
    async def main() -> None:
        async with house.door() as engine:
            inner, running = inner_of(engine), []
            step = inner.step

            def watched() -> Any:
                running.append("left" in inner.request_ids)
                return step()

            inner.step = watched  # type: ignore[method-assign]
            stays = asyncio.create_task(answer(engine, Job(LONG.prompt, LONG.params)))
            stream = engine.generate(LONG.prompt, LONG.params, "left")
            await anext(stream)
            await stream.aclose()
            running.clear()
            await stays
            assert len(running) > 20
            assert sum(running) <= 2

    asyncio.run(main())


def test_a_loop_that_is_closed_amid_a_stream_ends_its_requests(house: House) -> None:
    engine = house.door()
    loop = asyncio.new_event_loop()
    stream = engine.generate(LONG.prompt, LONG.params)
    loop.run_until_complete(anext(stream))
    loop.close()

    async def main() -> None:
        await until_empty(engine)
        await is_clean(engine)
        assert await answer(engine, Job(SHORT.prompt, SHORT.params)) == house.facts(
            Job(SHORT.prompt, SHORT.params)
        )
        await engine.shutdown()

    asyncio.run(main())
    del stream
    gc.collect()


def test_several_loops_share_an_engine(house: House) -> None:
    jobs = jobs_of(16)
    found: dict[int, Any] = {}

    async def main(engine: AsyncEngine, start: int) -> None:
        mine = jobs[start : start + 4]
        for i, told in enumerate(await asyncio.gather(*(answer(engine, job) for job in mine))):
            found[start + i] = told

    engine = house.door()
    asyncio.run(with_adapters(engine, house))
    threads = [
        threading.Thread(target=lambda start=start: asyncio.run(main(engine, start)))
        for start in range(0, 16, 4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [found[i] for i in range(16)] == [house.facts(job) for job in jobs]
    asyncio.run(engine.shutdown())


# Readers that sleep -------------------------------------------------------------------------------


@pytest.mark.seconds
def test_slow_readers_hold_nobody_and_lose_nothing(house: House) -> None:
    """The engine is through with all before the slow ones have read their second output."""
    params = sampled(60, output_kind=RequestOutputKind.DELTA)
    slow = [Job(job.prompt, params, job.adapter) for job in jobs_of(8)]

    async def main() -> None:
        async with house.door() as engine:
            await with_adapters(engine, house)
            streams = [engine.generate(j.prompt, j.params, adapter=j.adapter) for j in slow]
            told = [[await anext(stream)] for stream in streams]
            fast = await asyncio.gather(*(answer(engine, job) for job in jobs_of(8)))
            assert fast == [house.facts(job) for job in jobs_of(8)]
            await until_empty(engine)
            await is_clean(engine)
            for job, outputs, stream in zip(slow, told, streams, strict=True):
                outputs += [output async for output in stream]
                assert len(outputs) == 2
                assert facts(joined(outputs)) == house.facts(job)

    asyncio.run(main())


def test_an_event_loop_that_stands_still_holds_nobody(house: House) -> None:
    """Its reader then gets all of it, and the loop had one call from the engine to make."""

    async def main() -> None:
        async with house.door() as engine:
            stream = engine.generate(LONG.prompt, LONG.params)
            first = await anext(stream)
            reader = asyncio.create_task(anext(stream))
            await asyncio.sleep(0)
            deadline = time.monotonic() + 30
            while engine.num_requests and time.monotonic() < deadline:
                time.sleep(0.01)  # the loop stands still
            outputs = [first, await reader]
            assert outputs[-1].finished
            assert facts(joined(outputs)) == house.facts(Job(LONG.prompt, LONG.params))

    asyncio.run(main())


def test_a_crowd_that_arrives_does_not_hold_the_streams(house: House) -> None:
    """Between two steps requests are taken for some milliseconds, not all of them."""

    async def main() -> None:
        async with house.door() as engine:
            inner, taken = inner_of(engine), [0]
            add, step = inner.add_request, inner.step

            def slow(*args: Any, **given: Any) -> str:
                taken[-1] += 1
                time.sleep(0.004)
                return add(*args, **given)

            def counted() -> Any:
                taken.append(0)
                return step()

            inner.add_request, inner.step = slow, counted  # type: ignore[method-assign]
            jobs = [Job((5, 6), sampled(2)) for _ in range(60)]
            await asyncio.gather(*(answer(engine, job) for job in jobs))
            assert sum(taken) == 60
            assert max(taken) <= 4

    asyncio.run(main())


# What fails ---------------------------------------------------------------------------------------


def test_a_request_at_fault_is_told_and_the_others_keep_their_bits(house: House) -> None:
    def poison(ids: list[int], logits: Any) -> Any:
        if len(ids) == 3:
            raise ValueError("poison")
        return logits

    bad = Job(LONG.prompt, sampled(9, logits_processors=[poison]), "a1")
    jobs = jobs_of(8)

    async def main() -> None:
        async with house.door() as engine:
            await with_adapters(engine, house)
            outputs, *others = await asyncio.gather(
                read(engine, bad), *(answer(engine, job) for job in jobs)
            )
            assert others == [house.facts(job) for job in jobs]
            assert outputs[-1].outputs[0].finish_reason == "error"
            assert "poison" in str(outputs[-1].error)
            await is_clean(engine)

    asyncio.run(main())


@pytest.mark.parametrize(
    "error", [ValueError("planted"), MemoryError("planted"), SystemExit("planted")], ids=repr
)
def test_a_dead_thread_says_why_to_everyone(house: House, error: BaseException) -> None:
    async def main() -> None:
        async with house.door(max_num_seqs=2) as engine:
            inner, count = inner_of(engine), 0
            step, gate = inner.step, threading.Event()

            def fails() -> Any:
                nonlocal count
                count += 1
                if count > 5:
                    gate.wait(20)
                    raise error
                return step()

            inner.step = fails  # type: ignore[method-assign]
            streams = [asyncio.create_task(read(engine, Job((5,), LONG.params))) for _ in range(4)]
            while count < 6:
                await asyncio.sleep(0.001)
            waits = asyncio.create_task(engine.get_stats())
            await asyncio.sleep(0)
            gate.set()
            await everyone_is_told(engine, [*streams, waits], "planted")

    asyncio.run(main())


def test_an_engine_that_dies_says_why_to_everyone(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise ValueError("no device")

    async def main() -> None:
        async with house.door() as engine:
            runner = inner_of(engine).runner
            monkeypatch.setattr(runner, "submit", broken)
            monkeypatch.setattr(runner, "check_health", broken)
            streams = [asyncio.create_task(read(engine, Job((5,), LONG.params))) for _ in range(4)]
            await everyone_is_told(engine, streams, "cannot compute any more .*no device")

    asyncio.run(main())


async def everyone_is_told(engine: AsyncEngine, waiting: list[Any], why: str) -> None:
    for task in waiting:
        with pytest.raises(EngineDeadError, match=why):
            await asyncio.wait_for(task, 20)
    later: list[Callable[[], Any]] = [
        lambda: read(engine, SHORT),
        lambda: engine.abort("x"),
        lambda: engine.load_adapter("x", "y"),
        engine.check_health,
        engine.get_stats,
        engine.drain,
    ]
    for call in later:
        with pytest.raises(EngineDeadError, match=why):
            await asyncio.wait_for(call(), 20)
    assert engine.num_requests == 0


def test_what_a_call_raises_is_its_callers_alone(house: House) -> None:
    def fails(_: Engine) -> None:
        raise KeyError("mine")

    async def main() -> None:
        async with house.door() as engine:
            stream = asyncio.create_task(answer(engine, Job(SHORT.prompt, SHORT.params)))
            with pytest.raises(KeyError, match="mine"):
                await engine.call(fails)
            assert await stream == house.facts(Job(SHORT.prompt, SHORT.params))
            gone = asyncio.create_task(engine.call(lambda _: 1))
            await asyncio.sleep(0)
            gone.cancel()
            await engine.get_stats()

    asyncio.run(main())


def test_a_reader_whose_request_was_ended_in_the_engine_is_told_so(house: House) -> None:
    async def main() -> None:
        async with house.door() as engine:
            stream = engine.generate(LONG.prompt, LONG.params, "mine")
            await anext(stream)
            assert await engine.call(lambda inner: inner.abort("mine"))
            with pytest.raises(RequestError, match=r"'mine' was ended .* use AsyncEngine\.abort"):
                _ = [output async for output in stream]
            await is_clean(engine)

    asyncio.run(main())


def test_a_policy_that_has_all_wait_does_not_spin(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_open = threading.Event()

    class Waits:
        def order(self, waiting: Any, view: Any) -> Any:
            return waiting if is_open.is_set() else []

    monkeypatch.setitem(policies.POLICIES, "waits", Waits())

    async def main() -> None:
        async with house.door(policy="waits") as engine:
            inner, count = inner_of(engine), 0
            step = inner.step

            def counted() -> Any:
                nonlocal count
                count += 1
                return step()

            inner.step = counted  # type: ignore[method-assign]
            stream = asyncio.create_task(answer(engine, Job(SHORT.prompt, SHORT.params)))
            await asyncio.sleep(0.1)
            assert 2 <= count <= 150  # a thousand each second at most
            is_open.set()
            assert await stream == house.facts(Job(SHORT.prompt, SHORT.params))

    asyncio.run(main())


# Processes ----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_is_told_so(house: House) -> None:
    engine = house.door()
    stream = engine.generate(LONG.prompt, LONG.params)

    async def begin() -> None:
        await anext(stream)

    loop = asyncio.new_event_loop()
    loop.run_until_complete(begin())
    child = os.fork()
    if not child:
        told = 0
        try:
            for call in (engine.get_stats, engine.check_health, engine.drain):
                try:
                    asyncio.new_event_loop().run_until_complete(call())
                except EngineBusyError as error:
                    told += "fork of the process" in str(error)
            engine._finalizer()  # returns, for there is no thread
        finally:
            os._exit(told)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
    loop.run_until_complete(stream.aclose())
    loop.run_until_complete(engine.shutdown())
    loop.close()


LEFT_RUNNING = """
import asyncio, sys, signal, threading, os, time
from multilora import AsyncEngine, EngineConfig, SamplingParams

# Who is started in the background, as by a shell's &, has it ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
engine = AsyncEngine(EngineConfig(model=sys.argv[1], skip_tokenizer_init=True, max_model_len=256))

async def main(interrupted):
    params = SamplingParams(max_tokens=200, ignore_eos=True)
    async for output in engine.generate([5, 6, 7], params):
        if interrupted:
            os.kill(os.getpid(), signal.SIGINT)
            await asyncio.sleep(10)  # another thread may be the one that it meets, and later
        elif sys.argv[2] == "end":
            print("left", flush=True)
            return

try:
    asyncio.run(main(sys.argv[2] == "interrupt"))
except KeyboardInterrupt:
    for _ in range(1000):
        if not engine.num_requests:
            print("left", flush=True)
            break
        time.sleep(0.01)
"""


@pytest.mark.seconds
@pytest.mark.parametrize("way", ["end", "interrupt"])
def test_a_process_ends_though_nobody_shut_it_down(
    house: House, run_python: Callable[..., str], way: str
) -> None:
    argv = f"import sys; sys.argv += [{str(house.root / 'base')!r}, {way!r}]\n"
    assert run_python(argv + LEFT_RUNNING) == "left\n"


def num_threads() -> int:
    """Of engines; others of this process come and go."""
    return sum(thread.name == "multilora-engine" for thread in threading.enumerate())


def test_an_engine_that_nobody_holds_ends_its_thread(house: House) -> None:
    before = num_threads()
    engine = house.door()
    assert num_threads() == before + 1
    del engine
    gc.collect()
    assert num_threads() == before


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="no signals for threads")
def test_a_signal_amid_a_stream_changes_nothing(house: House) -> None:
    """Python handles it on the main thread; here it has a handler that uses the engine's door."""
    seen = []

    async def main() -> None:
        async with house.door() as engine:

            def handle(*_: Any) -> None:
                with suppress(MultiloraError):
                    engine._thread.submit(lambda inner: seen.append(inner.stats.steps))

            before = signal.signal(signal.SIGUSR1, handle)
            try:
                task = asyncio.create_task(answer(engine, Job(LONG.prompt, LONG.params)))
                while not task.done():
                    os.kill(os.getpid(), signal.SIGUSR1)
                    await asyncio.sleep(0.005)
                assert await task == house.facts(Job(LONG.prompt, LONG.params))
            finally:
                signal.signal(signal.SIGUSR1, before)

    asyncio.run(main())
    assert len(seen) > 2


def test_after_shutdown_nothing_of_the_engine_is_held(house: House) -> None:
    async def main() -> Engine:
        async with house.door() as engine:
            stream = engine.generate(LONG.prompt, LONG.params)
            await anext(stream)
            inner = inner_of(engine)
        with pytest.raises(EngineClosedError):
            _ = [output async for output in stream]
        return inner

    inner = asyncio.run(main())
    inner.check_integrity()
    assert (inner.has_work, inner.memory()["kv"]) == (False, 0)
