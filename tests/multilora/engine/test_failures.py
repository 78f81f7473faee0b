"""Who fails in a step ends with the reason; the others go on."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import pytest

from multilora.engine.failures import FailureIsolation
from multilora.engine.output_processor import CompletionState
from multilora.errors import EngineDeadError
from tests.harness.recovery import FORMS, SHORT, World, sampled
from tests.harness.tiny_engines import Job, add, drain, facts, prompt_of, run

if TYPE_CHECKING:
    from collections.abc import Callable

    from multilora.engine.engine import Engine


# A file that an exception left open is closed by Python, which says so.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


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


# The trials themselves, without an engine: `broken` says which steps fail ------------------------


def run_trials(size: int, broken: Callable[[frozenset[int]], bool]) -> tuple[list[list[int]], Any]:
    """Steps of what may run until all have one token; the steps' members, and who was given up."""
    isolation, done = FailureIsolation(), dict.fromkeys(range(size), 0)
    steps, lost, whole = [], [], False
    while waiting := frozenset(i for i, tokens in done.items() if tokens == 0):
        whole |= isolation.settle(done.get)
        members = isolation.members
        step = waiting if members is None else waiting & members
        steps.append(sorted(step))
        if broken(step):
            for seq_id in isolation.failed(dict.fromkeys(sorted(step), 1)):
                lost.append(seq_id)
                del done[seq_id]
        else:
            done |= dict.fromkeys(step, 1)
        assert len(steps) < 50
    whole |= isolation.settle(done.get)
    assert isolation.members is None
    return steps, (lost, whole)


def test_a_step_that_fails_once_is_only_repeated() -> None:
    calls = iter([True, False])
    assert run_trials(4, lambda _: next(calls)) == ([[0, 1, 2, 3]] * 2, ([], False))


def test_the_one_that_fails_is_found_by_halves_and_tried_twice_alone() -> None:
    steps, found = run_trials(4, lambda step: 2 in step)
    assert steps == [[0, 1, 2, 3], [0, 1, 2, 3], [0, 1], [2, 3], [2], [2], [3]]
    assert found == ([2], False)


def test_two_that_fail_are_both_found() -> None:
    _, (lost, whole) = run_trials(8, lambda step: bool(step & {1, 6}))
    assert (sorted(lost), whole) == ([1, 6], False)


def test_what_passes_in_halves_failed_as_a_whole() -> None:
    steps, found = run_trials(4, lambda step: len(step) > 2)
    assert steps == [[0, 1, 2, 3], [0, 1, 2, 3], [0, 1], [2, 3]]
    assert found == ([], True)


def test_a_text_that_cannot_be_made_once_or_twice_is_made_later(
    writer: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exception in the step and one in its recovery cost the answer nothing."""
    job = Job(tuple(range(40, 50)), sampled(4))
    alone = facts(run(writer, [job])[0])
    advance = CompletionState.advance
    for fails in ((2,), (2, 3), (1, 2)):
        calls = itertools.count(1)

        def advance_or_raise(answer: Any, calls: Any = calls, fails: Any = fails) -> None:
            if next(calls) in fails:
                raise MemoryError("once")
            advance(answer)

        with monkeypatch.context() as patch:
            patch.setattr(CompletionState, "advance", advance_or_raise)
            assert facts(run(writer, [job])[0]) == alone, fails


def test_an_ended_answer_whose_text_cannot_be_made_says_so(
    writer: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    advance = CompletionState.advance

    def advance_or_raise(answer: Any) -> None:
        if answer.seq.finish_reason is not None and answer._tokenizer is not None:
            raise MemoryError("always")
        advance(answer)

    monkeypatch.setattr(CompletionState, "advance", advance_or_raise)
    output = run(writer, [Job(tuple(range(40, 50)), sampled(2))])[0]
    assert output.outputs[0].finish_reason == "error"
    assert output.error is not None
    assert "its text cannot be made: MemoryError: always" in output.error


def test_an_exception_without_a_text_of_its_own_is_told_by_its_class(world: World) -> None:
    class Mute(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no text")

    def processor(_: list[int], logits: Any) -> Any:
        raise Mute

    engine, neighbour = world.engine("eager"), Job(SHORT, sampled(4))
    bad = Job(SHORT, sampled(4).clone(logits_processors=[processor]))
    found = run(engine, [bad, neighbour])
    assert found[0].error is not None
    assert "Mute" in found[0].error
    assert facts(found[1]) == world.facts(neighbour)
