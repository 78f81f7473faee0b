"""Adapters are read on any thread, and change nothing until the engine installs them."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from safetensors.torch import load_file

from multilora.errors import AdapterError, AdapterInvalid, ConfigError
from tests.harness.tiny_engines import Job, facts, greedy, make_engine, prompt_of, run

if TYPE_CHECKING:
    from multilora.engine.engine import Engine

JOB = Job(prompt_of(12), greedy(6, logprobs=2), "x")


def tensors_of(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    config = json.loads((folder / "adapter_config.json").read_text())
    return config, load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("source", ["folder", "tensors"])
def test_what_is_read_on_a_thread_serves_as_what_is_loaded(source: str, root: Path) -> None:
    engine, found = make_engine(root / "base"), []

    def read() -> None:
        if source == "folder":
            found.append(engine.reader.read_folder("x", root / "a"))
        else:
            found.append(engine.reader.read_tensors("x", *tensors_of(root / "a")))

    thread = threading.Thread(target=read)
    thread.start()
    thread.join()
    assert engine.adapters == {}
    digest = engine.install_adapter("x", found[0])
    loaded = make_engine(root / "base", {"x": root / "a"})
    assert (digest, *engine.adapters) == (loaded.adapters["x"].digest, "x")
    assert facts(run(engine, [JOB])[0]) == facts(run(loaded, [JOB])[0])


def test_reading_beside_steps_changes_no_bit_of_theirs(root: Path, engine: Engine) -> None:
    job = Job(JOB.prompt, greedy(60, logprobs=1), "a")
    alone, is_over = facts(run(engine, [job])[0]), threading.Event()
    count = [0]

    def read() -> None:
        while not is_over.is_set():
            engine.reader.read_folder("x", root / "c")
            count[0] += 1

    thread = threading.Thread(target=read)
    thread.start()
    while not count[0]:
        thread.join(0.001)
    beside = facts(run(engine, [job])[0])
    is_over.set()
    thread.join()
    assert beside == alone
    assert sorted(engine.adapters) == ["a", "b"]


def test_what_is_no_adapter_is_refused(root: Path, engine: Engine) -> None:
    reader = engine.reader
    for path in (None, 7, root / "nothing"):
        with pytest.raises(AdapterInvalid):
            reader.read_folder("x", path)  # type: ignore[arg-type]
    with pytest.raises(AdapterError):
        reader.read_folder("", root / "a")
    for given in ((None, {}), ({}, None)):
        with pytest.raises(AdapterInvalid, match="must be a mapping"):
            reader.read_tensors("x", *given)  # type: ignore[arg-type]


def test_a_user_without_a_home_needs_a_place_for_what_is_fetched_alone(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", none)
    make_engine(root / "base", {"a": root / "a"})
    with pytest.raises(ConfigError, match="set adapter_cache_dir to a folder"):
        make_engine(root / "base", adapter_sources=("hf://me/",))
    make_engine(root / "base", adapter_sources=("hf://me/",), adapter_cache_dir=str(root / "c"))
