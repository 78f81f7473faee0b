"""The runner alone: what `reset` recovers from, what `check_health` says, why a chunk fails."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

import multilora
import multilora_kernels as mk
from multilora.device.cpu import Device
from multilora.runtime.model_runner import ModelRunner
from multilora.sampling.sampler import MESSAGES, SampleError
from multilora.sampling_params import SamplingParams
from multilora.scheduling.scheduler_output import (
    ChunkResult,
    NewSequence,
    ScheduledChunk,
    SchedulerOutput,
)
from tests.harness.adapter_folders import write_adapter
from tests.harness.model_folders import TINY, write_checkpoint
from tests.harness.tiny_engines import make_engine, prompt_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from multilora.engine.engine import Engine

POINTS = 8  # at which a run is interrupted, of some thousand
STEPS = 6  # the first computes the prompts; by the fourth its size is captured
PARAMS = (
    SamplingParams(temperature=0, logprobs=2, prompt_logprobs=1),
    SamplingParams(frequency_penalty=0.5, repetition_penalty=1.2),
    SamplingParams(top_k=20, logit_bias={5: 1.0}, logprobs=1),
)
LENGTHS = (9, 5, 12)
SEEN = (
    str(Path(multilora.__file__).parent),
    str(Path(mk.__file__).parent),
    torch.utils._python_dispatch.__file__,
)


class Interrupted(BaseException):
    """What Ctrl-C is."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runner")
    write_checkpoint(folder / "base")
    write_adapter(folder / "a", TINY, rank=8, seed=8, scale=0.3)
    return folder


def engine_of(root: Path, **settings: Any) -> Engine:
    engine = make_engine(root / "base", {"a": root / "a"}, **settings)
    assert engine.store.pin(engine.store.resolve("a")) == 0
    return engine


def plan_of(step: int) -> SchedulerOutput:
    """Step `step` of three sequences: their prompts, then a token of each; two blocks each."""
    chunks, new = [], []
    for slot, (params, length) in enumerate(zip(PARAMS, LENGTHS, strict=True)):
        start, count = (0, length) if step == 0 else (length + step - 1, 1)
        chunks.append(
            ScheduledChunk(slot, start, count, slot % 2 - 1, (2 * slot, 2 * slot + 1), True)
        )
        if step == 0:
            ids = list(prompt_of(length, seed=slot))
            new.append(NewSequence(slot, ids, length, params, 7 + slot, frozenset()))
    return SchedulerOutput(tuple(new), tuple(chunks), ())


def answers(runner: ModelRunner, depth: int = 1) -> list[tuple[ChunkResult, ...]]:
    """What comes of all steps, `depth` of which are in flight at a time."""
    handles, found = [], []
    for step in range(STEPS):
        handles.append(runner.submit(plan_of(step)))
        if len(handles) == depth:
            found.append(runner.collect(handles.pop(0)).chunks)
    return found + [runner.collect(handle).chunks for handle in handles]


class Events:
    """Counts the calls of the project's functions, and of what these call in C."""

    def __init__(self, last: int | None = None) -> None:
        self.count, self.last = 0, last

    def __call__(self, frame: Any, event: str, _: Any) -> None:
        code = frame.f_code
        if event not in ("call", "c_call") or not code.co_filename.startswith(SEEN):
            return
        if code.co_name == "give_back":  # runs in a garbage collection, where nothing is raised
            return
        self.count += 1
        if self.count == self.last:
            raise Interrupted


@contextmanager
def watched(events: Events) -> Iterator[Events]:
    sys.setprofile(events)
    try:
        yield events
    finally:
        sys.setprofile(None)


def forget_graphs(runner: ModelRunner) -> None:
    """So that the next steps are run once, then captured, then replayed."""
    if runner.graphs is not None:
        runner.graphs._graphs.clear()
        runner.graphs._came.clear()


def nothing_is_left_open() -> bool:
    """Whether no capture is going on in this thread."""
    nobody = mk.cpu.graph._state.capture is None
    return nobody and torch.utils._python_dispatch._get_current_dispatch_mode() is None


SETTINGS: dict[str, dict[str, Any]] = {
    "host": {},
    "device": {"async_scheduling": True, "overlap_lora": True},
    "eager": {"enforce_eager": True},
}


@pytest.mark.seconds
@pytest.mark.parametrize("case", SETTINGS)
def test_a_reset_runner_goes_on_with_the_same_bits_wherever_it_was_interrupted(
    root: Path, case: str
) -> None:
    runner = engine_of(root, **SETTINGS[case]).runner
    depth = 2 if case == "device" else 1
    wanted = answers(runner, depth)
    forget_graphs(runner)
    with watched(Events()) as all_events:
        assert answers(runner, depth) == wanted
    # Some few calls are made or not, by when memory comes back: the last ones are not for sure.
    points = range(1, all_events.count - 20, max(all_events.count // POINTS, 1) | 1)
    assert len(points) >= POINTS
    for point in points:
        forget_graphs(runner)
        with pytest.raises(Interrupted), watched(Events(point)):
            answers(runner, depth)
        runner.reset()
        assert nothing_is_left_open(), f"at {point}"
        assert answers(runner, depth) == wanted, f"interrupted at {point} of {all_events.count}"


def test_a_reset_forgets_sequences_and_may_be_repeated(root: Path) -> None:
    runner = engine_of(root).runner
    wanted = answers(runner)
    runner.submit(plan_of(0))
    runner.reset()
    runner.reset()
    with pytest.raises(KeyError):  # who says that a sequence goes on must have brought it
        runner.submit(plan_of(1))
    runner.reset()
    assert answers(runner) == wanted


def test_a_reset_waits_for_the_device_and_raises_what_it_raises(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = engine_of(root).runner
    wanted = answers(runner)

    def broken(device: Device) -> None:
        raise RuntimeError("the device is lost")

    with monkeypatch.context() as patch:
        patch.setattr(Device, "synchronize", broken)
        with pytest.raises(RuntimeError, match="the device is lost"):
            runner.reset()
        with pytest.raises(RuntimeError, match="the device is lost"):
            runner.check_health()
    runner.reset()
    assert answers(runner) == wanted


@pytest.mark.seconds
@pytest.mark.parametrize("case", SETTINGS)
def test_a_health_check_changes_nothing(root: Path, case: str) -> None:
    runner = engine_of(root, **SETTINGS[case]).runner
    wanted = answers(runner)
    runner.check_health()
    handle = runner.submit(plan_of(0))
    before = runner.cache.k.clone(), runner.cache.v.clone()
    runner.check_health()
    assert torch.equal(runner.cache.k, before[0])
    assert torch.equal(runner.cache.v, before[1])
    found = [runner.collect(handle).chunks]
    for step in range(1, STEPS):
        handle = runner.submit(plan_of(step))
        runner.check_health()  # beside a step in flight
        found.append(runner.collect(handle).chunks)
    assert found == wanted


def test_a_health_check_raises_what_the_model_raises(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = engine_of(root).runner

    def broken(*_: Any) -> None:
        raise MemoryError("none is left")

    monkeypatch.setattr(type(runner.model), "forward", broken)
    with pytest.raises(MemoryError):
        runner.check_health()


@pytest.mark.parametrize("case", SETTINGS)
def test_a_chunk_says_why_it_has_no_token(root: Path, case: str) -> None:
    runner = engine_of(root, **SETTINGS[case]).runner
    healthy = answers(runner)[0]
    plan = plan_of(0)
    masked = SamplingParams(allowed_token_ids=[4], min_tokens=2)
    new = replace(plan.new_sequences[1], params=masked, stop_ids=frozenset((4,)))
    result = runner.collect(
        runner.submit(
            replace(plan, new_sequences=(plan.new_sequences[0], new, plan.new_sequences[2]))
        )
    )
    assert (result.chunks[1].token, result.chunks[1].error) == (
        None,
        MESSAGES[SampleError.NO_TOKEN],
    )
    assert (result.chunks[0], result.chunks[2]) == (healthy[0], healthy[2])
    runner.reset()
    runner.model.norm.weight.fill_(float("nan"))
    result = runner.collect(runner.submit(plan))
    assert [(chunk.token, chunk.error) for chunk in result.chunks] == [
        (None, MESSAGES[SampleError.NOT_FINITE])
    ] * 3
