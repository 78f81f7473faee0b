"""A step is a transaction: whatever is raised at any point of it, every answer keeps its bits."""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from multilora.engine.core import FRAMES
from tests.harness.failpoints import as_the_lock_opens, points_of, raised_at, raised_at_call
from tests.harness.recovery import FORMS, LONG, SHORT, World, sampled
from tests.harness.tiny_engines import Job, add, drain, facts

if TYPE_CHECKING:
    from pathlib import Path

    from multilora.engine.engine import Engine
    from multilora.outputs import RequestOutput


# A file that an exception left open is closed by Python, which says so.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@dataclass(frozen=True)
class Moment:
    """Jobs, and how many steps lie before the one that is disturbed."""

    jobs: tuple[Job, ...]
    steps: int


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
    # Some few calls are made or not, by what the steps before have left.
    assert reached >= 0.9 * len(points[first::every]) - 2


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

    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        as_the_lock_opens(interrupt, engine.step)
    check_the_rest(world, engine, jobs, outputs)


def test_an_interrupt_while_what_was_told_is_dropped_hides_nobody(world: World) -> None:
    engine = world.engine("eager")
    short, longer = Job(SHORT, sampled(1)), Job(SHORT, sampled(4))
    for number in range(30):
        ended, other = {add(engine, short) for _ in range(3)}, add(engine, longer)
        told = {output.request_id for output in engine.step() if output.finished}
        assert told == ended, "they end in one step"
        raised_at_call(number, KeyboardInterrupt(), engine.step)
        assert engine.has_work, number
        assert engine.request_ids == (other,), number
        assert drain(engine).keys() == {other}


def test_a_caller_near_the_recursion_limit_costs_nothing(world: World) -> None:
    """It gets Python's own error; the next call, from elsewhere, goes on."""

    def at(depth: int) -> list[RequestOutput]:
        return at(depth - 1) if depth else engine.step()

    engine = world.engine("eager")
    here = len(inspect.stack())
    jobs, outputs = come_to(engine, MOMENTS["decode"])
    errors = 0
    for spare in (*range(2, FRAMES + 60, 6), 5, 5, 5, 5, 40, 40, 40, 40):
        try:
            outputs += at(sys.getrecursionlimit() - here - spare)
        except RecursionError:
            errors += 1
    assert errors > 10
    check_the_rest(world, engine, jobs, outputs)


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
