"""Adapters that lie elsewhere: fetched when a request names one, while the others step on."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import pytest

from multilora.adapters.loader import RegistryChanges
from multilora.adapters.sources import folders, remote
from multilora.errors import AdapterInvalid, AdapterUnavailable, ConfigError
from tests.harness.adapter_servers import Server, cut, serving, stall
from tests.harness.tiny_engines import Job, add, drain, facts, greedy, make_engine, prompt_of, run

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from multilora.engine.engine import Engine

WEIGHTS = "adapter_model.safetensors"
JOB = Job(prompt_of(20, seed=1), greedy(6, logprobs=3), "a")


@pytest.fixture
def server(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(remote, "READ_SECONDS", 0.3)
    monkeypatch.setattr(folders, "FIRST_PAUSE", 0.01)
    with serving() as server:
        for name in "ab":
            server.put(f"mine/{name}", root / name)
        yield server


def engine_of(server: Server, root: Path, tmp_path: Path, **settings: Any) -> Engine:
    settings = {"adapter_sources": [f"{server.url}/mine"], **settings}
    return make_engine(root / "base", adapter_cache_dir=str(tmp_path / "cache"), **settings)


def alone(root: Path, job: Job) -> Any:
    return facts(run(make_engine(root / "base", {n: root / n for n in "ab"}), [job])[0])


def test_a_request_gets_what_lies_elsewhere(server: Server, root: Path, tmp_path: Path) -> None:
    engine = engine_of(server, root, tmp_path, max_host_adapter_bytes=1)
    for name in "ab":
        engine.register_adapter(name, f"{server.url}/mine/{name}")
    assert server.asked == []
    for name in "abab":
        job = Job(JOB.prompt, JOB.params, name)
        assert facts(run(engine, [job])[0]) == alone(root, job)
    assert engine.stats.adapter_loads == 4
    assert server.asked.count(("GET", f"/mine/a/{WEIGHTS}")) == 1
    other = engine_of(server, root, tmp_path)  # another process would find the same
    assert other.load_adapter("a", f"{server.url}/mine/a") == other.adapters["a"].digest
    assert server.asked.count(("GET", f"/mine/a/{WEIGHTS}")) == 1


def test_a_hub_is_a_source(
    server: Server, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    server.put_on_hub("me/a", root / "a")
    engine = engine_of(server, root, tmp_path, adapter_sources=["hf://me/"])
    engine.register_adapter("a", "hf://me/a")
    assert engine.registered_adapters["a"].path == "hf://me/a"
    assert facts(run(engine, [JOB])[0]) == alone(root, JOB)


def test_a_resolver_may_name_a_source(server: Server, root: Path, tmp_path: Path) -> None:
    engine = engine_of(
        server,
        root,
        tmp_path,
        resolver=lambda name: {"a": f"{server.url}/mine/a", "x": "hf://me/x"}.get(name),
    )
    assert facts(run(engine, [JOB])[0]) == alone(root, JOB)
    (output,) = run(engine, [Job(JOB.prompt, JOB.params, "x")])
    assert "adapters are not fetched from 'hf://me/x': the setting" in (output.error or "")


def test_what_may_not_be_fetched_is_refused_at_once(
    server: Server, root: Path, tmp_path: Path
) -> None:
    engine = engine_of(server, root, tmp_path)
    for source in (f"{server.url}/theirs/a", "hf://me/a", "hf://me/a/../b", "ftp://host/x"):
        for call in (engine.register_adapter, engine.load_adapter):
            with pytest.raises(AdapterInvalid):
                call("x", source)
    assert (engine.registered_adapters, server.asked) == ({}, [])


def test_a_stalling_server_holds_up_those_who_wait_for_it_alone(
    server: Server, root: Path, tmp_path: Path
) -> None:
    engine = engine_of(server, root, tmp_path)
    server.answers[f"/mine/a/{WEIGHTS}"] = [stall((root / "a" / WEIGHTS).read_bytes())]
    engine.register_adapter("a", f"{server.url}/mine/a")
    engine.register_adapter("b", root / "b")
    waits = add(engine, JOB)
    job = Job(JOB.prompt, JOB.params, "b")
    begin, outputs = time.monotonic(), {}
    runs, base = add(engine, job), add(engine, Job(JOB.prompt, JOB.params, None))
    while not {runs, base} <= outputs.keys():
        outputs |= {output.request_id: output for output in engine.step() if output.finished}
        engine.check_integrity()
    assert waits not in outputs
    assert time.monotonic() - begin < 3
    assert facts(outputs[runs]) == alone(root, job)
    output = drain(engine)[waits]
    assert f"{server.url}/mine/a could not be fetched, in 3 attempts" in (output.error or "")
    with pytest.raises(AdapterUnavailable, match="it can be tried again in 1 s"):
        add(engine, JOB)
    del server.answers[f"/mine/a/{WEIGHTS}"]
    engine.register_adapter("a", f"{server.url}/mine/a")
    assert facts(run(engine, [JOB])[0]) == alone(root, JOB)


def test_a_pinned_digest_is_met_or_refused(server: Server, root: Path, tmp_path: Path) -> None:
    digests = make_engine(root / "base", {name: root / name for name in "ab"}).adapters
    engine = engine_of(server, root, tmp_path, max_host_adapter_bytes=1)
    source = f"{server.url}/mine/a"
    engine.register_adapter("a", source, digest=digests["a"].digest)
    assert facts(run(engine, [JOB])[0]) == alone(root, JOB)
    asked = len(server.asked)
    server.answers[f"/mine/a/{WEIGHTS}"] = [cut(b"gone")]
    assert facts(run(engine, [JOB])[0]) == alone(root, JOB)  # of the cache: nobody is asked
    assert len(server.asked) == asked
    del server.answers[f"/mine/a/{WEIGHTS}"]
    server.put("mine/a", root / "b")
    engine.register_adapter("b", source, digest=digests["b"].digest)  # what is there by now
    job = Job(JOB.prompt, JOB.params, "b")
    assert facts(run(engine, [job])[0]) == alone(root, job)
    engine.register_adapter("a", source, digest=digests["a"].digest)
    (output,) = run(engine, [JOB])
    assert f"was registered with {digests['a'].digest}" in (output.error or "")


def test_a_registry_may_change_while_requests_run(
    server: Server, root: Path, tmp_path: Path
) -> None:
    engine, path = engine_of(server, root, tmp_path), tmp_path / "adapters.toml"
    path.write_text(f'[adapters]\na = "{root / "a"}"\nb = "{server.url}/mine/b"')
    assert engine.sync_adapters(path) == RegistryChanges(("a", "b"), ())
    jobs = [Job(JOB.prompt, JOB.params, name) for name in "ab"]
    for job, output in zip(jobs, run(engine, jobs), strict=True):
        assert facts(output) == alone(root, job)
    assert engine.sync_adapters(path) == RegistryChanges()
    assert sorted(engine.adapters) == ["a", "b"]
    for wrong in ("[adapters", '[adapters]\na = "x"\nb = "hf://me/b"', '[adapters]\na = "ftp://x"'):
        path.write_text(wrong)
        with pytest.raises((ConfigError, AdapterInvalid), match=r"adapters\.toml"):
            engine.sync_adapters(path)
        assert sorted(engine.adapters) == ["a", "b"]
    running = add(engine, JOB)
    engine.step()
    path.write_text(f'[adapters.a]\nsource = "{server.url}/mine/b"\npinned = true')
    assert engine.sync_adapters(path) == RegistryChanges(("a",), ("b",))
    after = add(engine, JOB)
    outputs = drain(engine)
    assert facts(outputs[running]) == alone(root, JOB)  # on what it began with
    assert facts(outputs[after]) == alone(root, jobs[1])
    assert list(engine.registered_adapters) == ["a"]
    with pytest.raises(ConfigError, match="is a file's path, not 5"):
        engine.sync_adapters(5)  # type: ignore[arg-type]
