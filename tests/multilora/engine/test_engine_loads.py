"""Adapters that are registered: read when a request names one, while the others step on."""

from __future__ import annotations

import json
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from safetensors.torch import load_file

from multilora.adapters.loader import AdapterLoader
from multilora.errors import AdapterError, AdapterInvalid, AdapterNotFound, CapacityError
from tests.harness.adapter_folders import write_adapter
from tests.harness.failpoints import points_of, raised_at
from tests.harness.model_folders import TINY
from tests.harness.tiny_engines import Job, add, drain, facts, greedy, make_engine, prompt_of, run

if TYPE_CHECKING:
    from pathlib import Path

    from multilora.engine.engine import Engine

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
JOBS = [
    Job(prompt_of(20, seed=i), greedy(6, logprobs=3, n=1 + i % 2), spec)
    for i, spec in enumerate(("a", None, "b", {"a": 0.5, "b": -1.0}, "a"))
]


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Loads wait for this."""
    gate, load = threading.Event(), AdapterLoader._load

    def late(self: Any, *args: Any) -> Any:
        assert gate.wait(20)
        return load(self, *args)

    monkeypatch.setattr(AdapterLoader, "_load", late)
    return gate


def registered(root: Path, *names: str, **settings: Any) -> Engine:
    engine = make_engine(root / "base", **settings)
    for name in names:
        engine.register_adapter(name, root / name)
    return engine


def alone(root: Path, job: Job) -> Any:
    return facts(run(make_engine(root / "base", {n: root / n for n in "ab"}), [job])[0])


@pytest.mark.parametrize("settings", [{}, {"async_scheduling": True}, {"max_loras": 1}])
def test_requests_that_waited_for_loads_answer_as_ever(
    settings: dict[str, Any], root: Path
) -> None:
    engine = registered(root, "a", "b", **settings)
    assert engine.adapters == {}
    assert [info.state for info in engine.registered_adapters.values()] == ["registered"] * 2
    for job, output in zip(JOBS, run(engine, JOBS), strict=True):
        assert facts(output) == alone(root, job)
    assert engine.stats.adapter_loads == 2
    assert sorted(engine.adapters) == ["a", "b"]
    assert engine.memory()["kv"] == 0


def test_neighbours_step_on_while_an_adapter_is_read(root: Path, held: threading.Event) -> None:
    engine = registered(root, "a")
    waits, runs = add(engine, JOBS[0]), add(engine, JOBS[1])
    assert engine.request_ids == (waits, runs)
    done = []
    while len(done) < 1:
        done += [output for output in engine.step() if output.finished]
        engine.check_integrity()
    assert [output.request_id for output in done] == [runs]
    assert engine.has_work
    assert engine.step() == []
    assert (engine.output(waits).finished, engine.output(waits).adapter_start) == (False, None)
    assert engine.registered_adapters["a"].state == "loading"
    held.set()
    output = drain(engine)[waits]
    assert facts(output) == alone(root, JOBS[0])
    assert output.metrics is not None
    assert output.metrics.adapter_wait > 0
    assert done[0].metrics.adapter_wait == 0


def test_who_came_first_is_computed_first(root: Path, held: threading.Event) -> None:
    engine = registered(root, "a", max_num_seqs=1)
    first, second = add(engine, JOBS[0]), add(engine, JOBS[4])
    held.set()
    outputs = drain(engine)
    assert list(outputs) == [first, second]
    assert engine.stats.adapter_loads == 1


def test_a_failing_load_ends_those_who_wait_for_it_alone(
    root: Path, tmp_path: Path, held: threading.Event
) -> None:
    engine = registered(root, "a")
    broken = write_adapter(tmp_path / "x", TINY)
    (broken / "adapter_model.safetensors").write_bytes(b"short")
    engine.register_adapter("x", broken)
    bad = [add(engine, Job(prompt_of(9), greedy(n=2), spec)) for spec in ("x", {"a": 1, "x": 1})]
    good = add(engine, JOBS[0])
    held.set()
    outputs = drain(engine)
    for request in bad:
        assert [a.finish_reason for a in outputs[request].outputs] == ["error"] * 2
        assert "file is cut short" in (outputs[request].error or "")
    assert facts(outputs[good]) == alone(root, JOBS[0])
    with pytest.raises(AdapterInvalid, match="it can be tried again in 1 s"):
        add(engine, Job(prompt_of(9), greedy(), "x"))
    assert engine.stats.adapter_load_failures == 1
    write_adapter(tmp_path / "x", TINY)
    engine.register_adapter("x", broken)  # which begins anew
    assert run(engine, [Job(prompt_of(9), greedy(), "x")])[0].error is None


def test_an_adapter_that_never_fits_is_said_when_it_is_read(root: Path) -> None:
    engine = registered(root, "c", max_lora_rank=16)
    (output,) = run(engine, [Job(prompt_of(9), greedy(), "c")])
    assert output.error is not None
    assert "has rank 24" in output.error


def test_what_can_be_refused_at_once_is(root: Path) -> None:
    engine = registered(root, "a", num_kv_blocks=2)
    with pytest.raises(CapacityError, match="the KV pool of 2 blocks"):
        add(engine, Job(prompt_of(60), greedy(), "a"))
    with pytest.raises(AdapterNotFound):
        add(engine, Job(prompt_of(9), greedy(), {"a": 1.0, "unknown": 1.0}))
    for name, path, digest in (("../x", root, None), ("x", 5, None), ("x", root, "abc")):
        with pytest.raises(AdapterError):
            engine.register_adapter(name, path, digest=digest)  # type: ignore[arg-type]
    assert not engine.has_work
    assert engine.registered_adapters["a"].state == "registered"


def test_a_request_may_be_aborted_while_it_waits(root: Path, held: threading.Event) -> None:
    engine = registered(root, "a", "b")
    requests = [add(engine, job) for job in JOBS]
    for request in requests:
        assert engine.abort(request)
        engine.check_integrity()
    assert not engine.has_work
    assert engine.registered_adapters["b"].state == "registered"  # its load had not begun
    held.set()
    assert facts(run(engine, [JOBS[2]])[0]) == alone(root, JOBS[2])


def test_a_load_that_nobody_waits_for_any_more_counts_once_it_is_done(
    root: Path, held: threading.Event
) -> None:
    engine = registered(root, "a", "b", max_host_adapter_bytes=1)
    neighbour = add(engine, Job(prompt_of(9), greedy(8)))
    for name in "ab":
        held.clear()
        waits = add(engine, Job(prompt_of(9), greedy(), name))
        while not engine._loader._loads[name][1].running():
            time.sleep(0.001)  # from here on it cannot be cancelled
        assert engine.abort(waits)
        held.set()
        engine._loader.wait(10)
        engine.step()
        assert engine.registered_adapters[name].state == "registered"  # and not kept aside
    assert engine.stats.adapter_loads == engine.stats.adapter_evictions == 2
    assert drain(engine)[neighbour].error is None


def test_an_unloaded_name_ends_those_who_wait_for_it(root: Path, held: threading.Event) -> None:
    engine = registered(root, "a", "b")
    gone, stays = add(engine, JOBS[0]), add(engine, JOBS[2])
    engine.unload_adapter("a")
    held.set()
    outputs = drain(engine)
    assert "no adapter 'a'" in (outputs[gone].error or "")
    assert facts(outputs[stays]) == alone(root, JOBS[2])
    assert list(engine.registered_adapters) == ["b"]
    with pytest.raises(AdapterNotFound):
        engine.unload_adapter("a")
    engine.unload_adapter("b")
    assert (engine.adapters, engine.registered_adapters) == ({}, {})


def test_who_waits_gets_what_the_name_means_in_the_end(root: Path, held: threading.Event) -> None:
    engine = registered(root, "a", "b")
    requests = [add(engine, job) for job in (JOBS[0], JOBS[2])]
    engine.register_adapter("a", root / "b")  # read anew
    engine.load_adapter("b", root / "a")  # there at once
    held.set()
    outputs = drain(engine)
    swapped = [Job(JOBS[0].prompt, JOBS[0].params, "b"), Job(JOBS[2].prompt, JOBS[2].params, "a")]
    for request, job in zip(requests, swapped, strict=True):
        assert facts(outputs[request]) == alone(root, job)


def test_a_registered_name_replaces_a_loaded_one(root: Path) -> None:
    engine = make_engine(root / "base", {"a": root / "a"})
    old = add(engine, JOBS[0])
    engine.step()
    engine.register_adapter("a", root / "b")
    new = add(engine, JOBS[0])
    outputs = drain(engine)
    assert facts(outputs[old]) == alone(root, JOBS[0])
    assert facts(outputs[new]) == alone(root, Job(JOBS[0].prompt, JOBS[0].params, "b"))


def test_host_memory_stays_within_its_bound(root: Path) -> None:
    sizes = make_engine(root / "base", {name: root / name for name in "abc"}).adapters
    bound = sizes["c"].num_bytes + sizes["b"].num_bytes
    engine = registered(root, "a", "b", "c", max_host_adapter_bytes=bound)
    for number in range(12):
        job = Job(prompt_of(9, seed=number), greedy(3, logprobs=1), "abc"[number % 3])
        (output,) = run(engine, [job])
        folders = {name: root / name for name in "abc"}
        assert facts(output) == facts(run(make_engine(root / "base", folders), [job])[0])
        assert sum(info.num_bytes for info in engine.adapters.values()) <= bound
    assert engine.stats.adapter_evictions > 0
    assert engine.stats.adapter_loads == engine.stats.adapter_evictions + len(engine.adapters)


def test_what_was_above_the_bound_goes_when_its_requests_end(root: Path) -> None:
    engine = registered(root, "a", "b", max_host_adapter_bytes=1)
    requests = [add(engine, job) for job in JOBS]
    outputs = {}
    while len(engine.adapters) < 2:  # the mix waits for both; others may end meanwhile
        outputs |= {output.request_id: output for output in engine.step() if output.finished}
        engine.check_integrity()
    assert engine.stats.adapter_evictions == 0
    engine.abort(requests[3])
    outputs |= drain(engine)
    for request, job in zip(requests, JOBS, strict=True):
        if request != requests[3]:
            assert facts(outputs[request]) == alone(root, job)
    assert (engine.adapters, engine.stats.adapter_evictions) == ({}, 2)


def test_hits_and_misses_are_counted_and_what_is_on_the_device_is_known(root: Path) -> None:
    engine = registered(root, "a", "b", max_loras=1, max_lora_rank=16, lora_pages=2)
    engine.load_adapter("mine", root / "a")  # not registered: it counts as neither
    run(engine, [Job(prompt_of(9), greedy(), name) for name in ("a", "a", "mine")])
    run(engine, [Job(prompt_of(9), greedy(), "a")])
    assert (engine.stats.adapter_hits, engine.stats.adapter_misses) == (1, 2)
    assert engine.stats.adapter_loads == 1
    with pytest.raises(AdapterNotFound):
        add(engine, Job(prompt_of(9), greedy(), {"a": 1.0, "unknown": 1.0}))
    assert (engine.stats.adapter_hits, engine.stats.adapter_misses) == (1, 2)
    engine.register_adapter("b", root / "b")
    run(engine, [Job(prompt_of(9), greedy(), "b")])
    on_device = {name: info.on_device for name, info in engine.adapters.items()}
    assert on_device == {"a": False, "b": True, "mine": False}


def test_a_resolver_says_what_a_name_means(root: Path) -> None:
    engine = make_engine(root / "base", resolver=lambda name: root / name if name == "a" else None)
    assert facts(run(engine, [JOBS[0]])[0]) == alone(root, JOBS[0])
    with pytest.raises(AdapterNotFound):
        add(engine, JOBS[2])


@pytest.mark.parametrize("form", [{"enforce_eager": True}, {"async_scheduling": True}])
def test_an_exception_where_a_load_is_taken_in_costs_nothing(
    form: dict[str, Any], root: Path
) -> None:
    job, neighbour = JOBS[3], JOBS[1]
    wanted = [alone(root, job), alone(root, neighbour)]

    def come_to() -> tuple[Engine, list[str]]:
        engine = registered(root, "a", "b", **form)
        requests = [add(engine, one) for one in (job, neighbour)]
        engine.step()
        while not all(load.done() for _, load in engine._loader._loads.values()):
            time.sleep(0.001)
        return engine, requests

    points = points_of(come_to()[0].step)
    within = [p for p in points if "/adapters/" in p.file or p.file.endswith("engine/core.py")]
    assert len(within) > 30
    for number, point in enumerate(within[::9]):
        engine, requests = come_to()
        outputs: list[Any] = []
        error: BaseException = KeyboardInterrupt() if number % 2 else MemoryError()
        raised_at(point, error, lambda: outputs.extend(engine.step()))  # noqa: B023
        engine.check_integrity()
        finished = {output.request_id: output for output in outputs if output.finished}
        finished |= drain(engine)
        assert [facts(finished[request]) for request in requests] == wanted, point


def test_a_name_may_ask_for_a_version(root: Path, held: threading.Event) -> None:
    digests = {
        n: i.digest
        for n, i in make_engine(root / "base", {n: root / n for n in "ab"}).adapters.items()
    }
    engine = registered(root, "a")
    right = Job(JOBS[0].prompt, JOBS[0].params, f"a@{digests['a'][:8]}")
    wrong = Job(JOBS[0].prompt, JOBS[0].params, {f"a@{digests['b']}": 1.0})
    first, second = add(engine, right), add(engine, wrong)
    assert engine.registered_adapters["a"].state == "loading"
    held.set()
    outputs = drain(engine)
    assert facts(outputs[first]) == alone(root, JOBS[0])
    assert f"adapter 'a' is at {digests['a']} now, and not at {digests['b']}" in (
        outputs[second].error or ""
    )
    running = add(engine, right)
    engine.step()
    engine.load_adapter("a", root / "b")
    assert facts(drain(engine)[running]) == alone(root, JOBS[0])
    with pytest.raises(AdapterNotFound, match="adapter 'a' is at"):
        add(engine, right)
    for name in ("a@", "a@xyz", "a@3F3F3F", "a@123", f"a@{'0' * 65}"):
        with pytest.raises(AdapterNotFound, match="is no version of 'a'"):
            add(engine, Job(JOBS[0].prompt, JOBS[0].params, name))
    with pytest.raises(AdapterNotFound):
        engine.unload_adapter(f"a@{digests['b']}")
    engine.check_integrity()


def test_a_name_leads_to_where_its_adapter_came_from(root: Path) -> None:
    engine = make_engine(root / "base")
    engine.load_adapter("a", root / "a")
    engine.register_adapter("b", root / "b")
    assert [engine.has_adapter(name) for name in ("a", "b", "c")] == [True, True, False]
    places = [engine.adapter_path(name) for name in ("a", "b", "c")]
    assert places == [str(root / "a"), str(root / "b"), None]
    config = json.loads((root / "a" / "adapter_config.json").read_text())
    tensors = load_file(root / "a" / "adapter_model.safetensors")
    engine.load_adapter_from_tensors("a", config, tensors)  # which lie nowhere
    assert (engine.has_adapter("a"), engine.adapter_path("a")) == (True, None)
    for name in ("a", "b"):
        engine.unload_adapter(name)
        assert not engine.has_adapter(name)
        assert engine.adapter_path(name) is None
