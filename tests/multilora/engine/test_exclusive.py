"""Who may call an engine, and when."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from multilora.errors import EngineBusyError
from tests.harness.recovery import SHORT, World, sampled
from tests.harness.tiny_engines import Job, add, facts, run

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
