"""The runner alone: what `reset` recovers from, what `check_health` says, why a chunk fails."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

import multilora
import multilora_kernels as mk
from multilora.runtime.model_runner import ModelRunner
from multilora.sampling_params import SamplingParams
from multilora.scheduling.scheduler_output import (
    ChunkResult,
    NewSequence,
    ScheduledChunk,
    SchedulerOutput,
)
from tests.adapters import write_adapter
from tests.checkpoints import TINY, write_checkpoint
from tests.engines import make_engine, prompt_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from multilora.engine.engine import Engine

POINTS = 60  # at which a run is interrupted, of some thousand
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
            found.append(runner.collect(handles.pop(0)).rows)
    return found + [runner.collect(handle).rows for handle in handles]


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
    x, weight = torch.randn(2, 64), mk.pack(torch.randn(64, 64)) if mk.HAS_CPP else None
    made: list[bool] = []
    with mk.results_in(pool := mk.Pool()):
        if weight is not None:
            made.append(pool.owns(mk.linear(x, weight)))  # a tape would have taken it to its own
    return torch.utils._python_dispatch._get_current_dispatch_mode() is None and all(made)


SETTINGS: dict[str, dict[str, Any]] = {
    "host": {},
    "device": {"async_scheduling": True, "overlap_lora": True},
    "eager": {"enforce_eager": True},
}


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
    points = range(1, all_events.count, max(all_events.count // POINTS, 1) | 1)
    assert len(points) >= POINTS
    for point in points:
        forget_graphs(runner)
        with pytest.raises(Interrupted), watched(Events(point)):
            answers(runner, depth)
        runner.reset()
        assert nothing_is_left_open(), f"at {point}"
        assert answers(runner, depth) == wanted, f"interrupted at {point} of {all_events.count}"
