"""A step is a transaction: whatever is raised at any point of it, every answer keeps its bits."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pytest

from multilora.errors import EngineBusyError, EngineDeadError
from multilora.sampling_params import SamplingParams
from tests.harness.adapter_folders import write_adapter
from tests.harness.failpoints import points_of, raised_at
from tests.harness.model_folders import TINY, write_checkpoint
from tests.harness.tiny_engines import Job, add, drain, facts, make_engine, prompt_of, run

if TYPE_CHECKING:
    from pathlib import Path
    from types import FrameType

    from multilora.engine.engine import Engine
    from multilora.outputs import RequestOutput

# A file that an exception left open is closed by Python, which says so.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

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


@dataclass(frozen=True)
class Moment:
    """Jobs, and how many steps lie before the one that is disturbed."""

    jobs: tuple[Job, ...]
    steps: int


SHORT, LONG = prompt_of(5, seed=4), prompt_of(40, seed=5)
MOMENTS = {
    "first chunk, adapter to its pages": Moment((Job(LONG, sampled(3), "a"),), 0),
    "chunk of a prompt": Moment((Job(LONG, sampled(3, prompt_logprobs=1)),), 1),
    "decode": Moment((Job(SHORT, sampled(8), "a"), Job(SHORT, sampled(8, n=2))), 3),
    "capture": Moment((Job(SHORT, sampled(8)),), 2),
    "mixed": Moment((Job(SHORT, sampled(8)), Job(LONG, sampled(4), {"b": 0.5})), 2),
    "another adapter in place of one": Moment(
        (Job(SHORT, sampled(2), "a"), Job(SHORT, sampled(3), "b")), 2
    ),
    "preemption": Moment((Job(LONG, sampled(24)), Job(LONG[:30], sampled(24))), 16),
    "the last token": Moment((Job(SHORT, sampled(2)), Job(SHORT, sampled(6))), 1),
}


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


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("recovery")
    write_checkpoint(root / "base", num_layers=1)
    config = replace(TINY, num_layers=1)
    for seed, name in enumerate(NAMES):
        write_adapter(root / name, config, rank=8 + 8 * seed, seed=seed, scale=0.4)
    return World(root, {})


def come_to(engine: Engine, moment: Moment) -> tuple[dict[str, Job], list[RequestOutput]]:
    """Queues the jobs and makes the steps before; the jobs by request id, the outputs so far."""
    jobs = {add(engine, job): job for job in moment.jobs}
    return jobs, [output for _ in range(moment.steps) for output in engine.step()]


def check_the_rest(world: World, engine: Engine, jobs: dict[str, Job], outputs: list[Any]) -> None:
    """Steps to the end: nothing was lost or done twice, and each answer is the job's own."""
    engine.check_integrity()
    finished = {output.request_id: output for output in outputs if output.finished}
    finished |= drain(engine)
    assert finished.keys() == jobs.keys()
    for request, job in jobs.items():
        assert facts(finished[request]) == world.facts(job)
    engine.check_integrity()
    assert engine.memory()["kv"] == 0


def disturb(world: World, form: str, name: str, *, every: int, first: int = 0) -> None:
    """Raises at every `every`-th point of the moment's step, in one engine after the other."""
    moment = MOMENTS[name]
    engine = world.engine(form)
    for _ in range(2):  # what is made once, such as captured steps, is there from now on
        come_to(engine, moment)
        drain(engine)
    come_to(engine, moment)
    points = points_of(engine.step)
    drain(engine)
    reached = 0
    for number, point in enumerate(points[first::every]):
        # Of the two kinds of errors one is raised to the caller, the other one mended within.
        error: BaseException = KeyboardInterrupt() if number % 2 else MemoryError()
        if point.called == "__exit__" and point.file.endswith("exclusive.py"):
            continue  # of the lock: nothing interrupts it before it is given back
        jobs, outputs = come_to(engine, moment)
        came = raised_at(point, error, lambda: outputs.extend(engine.step()))  # noqa: B023
        try:
            within = not point.file.endswith(("exclusive.py", "engine/engine.py", "engine/core.py"))
            assert came is not True or isinstance(error, KeyboardInterrupt) or not within
            check_the_rest(world, engine, jobs, outputs)
        except Exception as found:
            raise AssertionError(f"after {error!r} at {point}") from found
        reached += came is not None
    assert len(points) > 100
    assert reached > 0.9 * len(points[first::every])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", MOMENTS)
def test_an_exception_in_a_step_costs_nothing(world: World, form: str, name: str) -> None:
    first = sum(map(len, (form, name))) % 60  # other points in each
    disturb(world, form, name, every=60, first=first)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", MOMENTS)
def test_an_exception_anywhere_in_a_step_costs_nothing(world: World, form: str, name: str) -> None:
    disturb(world, form, name, every=1)


def test_an_interrupt_on_the_way_back_to_the_caller_loses_no_output(world: World) -> None:
    engine = world.engine("eager")
    jobs, outputs = come_to(engine, MOMENTS["the last token"])

    def see(frame: FrameType, event: str, called: Any) -> None:
        in_gate = frame.f_code.co_filename.endswith("exclusive.py")
        if event == "c_return" and in_gate and called.__name__ == "__exit__":
            raise KeyboardInterrupt

    sys.setprofile(see)
    try:
        with pytest.raises(KeyboardInterrupt):
            engine.step()
    finally:
        sys.setprofile(None)
    check_the_rest(world, engine, jobs, outputs)


# Other calls --------------------------------------------------------------------------------------


def calls_of(engine: Engine, root: Path) -> dict[str, Any]:
    """Calls that change an engine in which request "x" runs."""
    return {
        "add_request": lambda: engine.add_request(SHORT, sampled(4), adapter="b", request_id="new"),
        "abort": lambda: engine.abort("x"),
        "load_adapter": lambda: engine.load_adapter("a", root / "b"),
        "unload_adapter": lambda: engine.unload_adapter("a"),
    }


@pytest.mark.parametrize("form", ["eager", "async"])
@pytest.mark.parametrize("call", ["add_request", "abort", "load_adapter", "unload_adapter"])
def test_an_exception_in_any_other_call_costs_the_others_nothing(
    world: World, form: str, call: str
) -> None:
    engine = world.engine(form)
    other, own = Job(SHORT, sampled(6), "a"), Job(SHORT, sampled(5, seed=9), "a")

    def begin() -> str:
        engine.load_adapter("a", world.root / "a")
        engine.add_request(own.prompt, own.params, adapter=own.adapter, request_id="x")
        other_id = add(engine, other)
        engine.step()
        return other_id

    begin()
    points = points_of(calls_of(engine, world.root)[call])
    drain(engine)
    for number, point in enumerate(points[::7]):
        error: BaseException = KeyboardInterrupt() if number % 2 else MemoryError()
        other_id = begin()
        raised_at(point, error, calls_of(engine, world.root)[call])
        engine.check_integrity()
        finished = drain(engine)
        assert facts(finished.pop(other_id)) == world.facts(other), point
        if (x := finished.pop("x", None)) is not None:
            assert facts(x) == world.facts(own), point
        if (new := finished.pop("new", None)) is not None:
            assert facts(new) == world.facts(Job(SHORT, sampled(4), "b")), point
        assert not finished
        engine.check_integrity()


# Requests that fail -------------------------------------------------------------------------------


class Poison(RuntimeError):
    """What a runner raises that cannot compute a certain token."""


@pytest.mark.parametrize("form", FORMS)
def test_a_request_that_fails_alone_ends_with_the_reason_and_its_neighbours_do_not(
    world: World, form: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = world.engine(form)
    bad = 77
    assert all(bad not in prompt_of(5, seed=seed) for seed in range(3))
    jobs = [Job(prompt_of(5, seed=seed), sampled(6), "a") for seed in range(3)]
    monkeypatch.setattr(engine.runner, "submit", _raises_for(engine, bad, failed := []))
    ids = [add(engine, job) for job in jobs]
    lost = engine.add_request((5, bad, 6), sampled(6))
    finished = drain(engine)
    for request, job in zip(ids, jobs, strict=True):
        assert facts(finished[request]) == world.facts(job)
    output = finished[lost]
    assert output.outputs[0].finish_reason == "error"
    assert output.error is not None
    assert "Poison: a bad token" in output.error
    assert failed[0] == 4  # all of them
    assert failed[-2:] == [1, 1]  # alone, twice
    assert len(failed) <= 6
    assert sum("ends with an error" in record.message for record in caplog.records) == 1
    assert engine.memory()["kv"] == 0


def _raises_for(engine: Engine, token: int, failed: list[int]) -> Any:
    submit = engine.runner.submit

    def submit_or_raise(output: Any) -> Any:
        running = {seq.request_slot: seq for seq in engine.scheduler.running}
        for chunk in output.chunks:
            if token in running[chunk.request_slot].tokens(chunk.start, chunk.start + chunk.count):
                failed.append(len(output.chunks))
                raise Poison("a bad token")
        return submit(output)

    return submit_or_raise


def test_what_only_fails_as_a_whole_goes_on_in_smaller_steps(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = world.engine("eager")
    submit, sizes = engine.runner.submit, []

    def short_of_memory(output: Any) -> Any:
        sizes.append(output.num_tokens)
        if output.num_tokens > 9:
            raise MemoryError
        return submit(output)

    monkeypatch.setattr(engine.runner, "submit", short_of_memory)
    jobs = [Job(prompt_of(5, seed=seed), sampled(6)) for seed in range(3)]
    ids = [add(engine, job) for job in jobs]
    finished = drain(engine)
    assert [facts(finished[i]) for i in ids] == [world.facts(job) for job in jobs]
    assert max(sizes[-5:]) <= 8
    assert any("steps have at most 8 tokens" in record.message for record in caplog.records)


def test_an_engine_on_which_nothing_runs_says_so(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = world.engine("eager")

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(engine.runner.model, "forward", broken)
    add(engine, Job(SHORT, sampled(4)))
    with pytest.raises(EngineDeadError, match="the device is gone"):
        drain(engine)
    for call in (engine.step, engine.check_integrity, lambda: engine.add_request(SHORT)):
        with pytest.raises(EngineDeadError, match="make a new one"):
            call()


def test_a_policy_that_raises_ends_the_engine_not_a_request(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = world.engine("eager")

    class Bad:
        def order(self, *_: Any) -> Any:
            raise ZeroDivisionError

    monkeypatch.setattr(engine.scheduler, "_policy", Bad())
    add(engine, Job(SHORT, sampled(4)))
    with pytest.raises(EngineDeadError, match="ZeroDivisionError"):
        drain(engine)


# Who may call -------------------------------------------------------------------------------------


def test_a_call_from_within_a_call_is_an_error_and_costs_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = world.engine("eager")
    submit, errors = engine.runner.submit, []

    def calls_back(output: Any) -> Any:
        with pytest.raises(EngineBusyError, match="abort was called from within") as error:
            engine.abort("x")
        errors.append(error)
        return submit(output)

    monkeypatch.setattr(engine.runner, "submit", calls_back)
    job = Job(SHORT, sampled(3))
    assert facts(run(engine, [job])[0]) == world.facts(job)
    assert errors


def test_threads_take_turns(world: World) -> None:
    engine = world.engine("eager")
    job = Job(SHORT, sampled(3), "a")
    with ThreadPoolExecutor(4) as threads:
        ids = list(threads.map(lambda _: add(engine, job), range(12)))
        finished: dict[str, Any] = {}
        while engine.has_work:
            for outputs in threads.map(lambda _: engine.step(), range(4)):
                finished |= {o.request_id: o for o in outputs if o.finished}
    assert sorted(finished) == sorted(ids)
    assert all(facts(output) == world.facts(job) for output in finished.values())
