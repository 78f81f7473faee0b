"""Who may call an engine, and when."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from multilora.engine.exclusive import Change
from multilora.errors import EngineBusyError, RequestError
from tests.harness.failpoints import as_the_lock_opens
from tests.harness.recovery import SHORT, World, sampled
from tests.harness.tiny_engines import Job, add, drain, facts, run

if TYPE_CHECKING:
    from collections.abc import Callable

    from multilora.outputs import RequestOutput

# A file that an exception left open is closed by Python, which says so.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


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


FORKED = """
import os, sys
import torch
torch.set_num_threads(2)
from multilora import Engine, EngineConfig, SamplingParams, errors

def answer():
    engine.add_request([5, 6, 7] * 20, SamplingParams(temperature=0, max_tokens=4))
    found = []
    while engine.has_work:
        found = engine.step()
    return found[0].outputs[0].token_ids

engine = Engine(EngineConfig(model=sys.argv[1], skip_tokenizer_init=True))
first = answer()  # after which OpenMP has threads, that a fork lacks
child = os.fork()
if not child:
    try:
        answer()
    except errors.EngineBusyError as error:
        print(error, flush=True)
        try:
            Engine(engine.config)
        except errors.ConfigError as error:
            print(error, flush=True)
            os._exit(7)
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
assert answer() == first
"""


def test_a_fork_of_its_process_is_told_so_at_once(
    world: World, run_python: Callable[..., str]
) -> None:
    code = f"import sys; sys.argv.append({world.engine('eager').config.model!r})\n{FORKED}"
    told = run_python(code, OMP_NUM_THREADS="2")
    assert told.startswith("Engine.add_request was called in a fork of the process that made")
    assert "get_context('spawn')" in told
    assert "is a fork of one that had made an engine" in told


def test_outputs_that_were_returned_are_not_told_again_after_an_error(world: World) -> None:
    engine = world.engine("eager")
    request = add(engine, Job(SHORT, sampled(1)))
    while not (outputs := engine.step()):
        pass
    assert [(output.request_id, output.finished) for output in outputs] == [(request, True)]
    with pytest.raises(RequestError):
        engine.add_request(())
    assert not engine.has_work
    assert engine.step() == []


@pytest.mark.parametrize(
    ("error", "is_torn"),
    [(None, False), (RequestError("x"), False), (ValueError("x"), True), (KeyboardInterrupt, True)],
)
def test_only_an_error_of_ours_leaves_the_core_whole(error: Any, is_torn: bool) -> None:
    core = SimpleNamespace(is_torn=False)
    with suppress(BaseException), Change(cast("Any", core)):
        assert core.is_torn
        if error is not None:
            raise error
    assert core.is_torn == is_torn


def test_another_thread_waits_until_what_was_told_has_reached_its_caller(world: World) -> None:
    """The interrupt comes when the lock is free again, and the other thread stands before it."""
    engine = world.engine("eager")
    jobs = [Job(SHORT, sampled(1)), Job(SHORT, sampled(3))]
    ids = [add(engine, job) for job in jobs]
    outputs: list[RequestOutput] = []
    errors: list[EngineBusyError] = []
    other = threading.Thread(target=lambda: outputs.extend(engine.step()))

    def act() -> None:
        other.start()
        other.join(0.1)  # it does not come in
        assert other.is_alive()
        with pytest.raises(EngineBusyError) as caught:  # nor does a signal handler
            engine.step()
        errors.append(caught.value)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        as_the_lock_opens(act, engine.step)
    other.join()
    assert errors
    finished = {output.request_id: output for output in outputs if output.finished}
    assert finished.keys() == {ids[0]}, "what the interrupted call was to tell"
    finished |= drain(engine)
    for job, request in zip(jobs, ids, strict=True):
        assert facts(finished[request]) == world.facts(job)
