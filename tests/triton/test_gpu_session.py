"""The clocks of `bench/gpu_session.py` run when all that Triton would compile is compiled."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from multilora.device.select import open_device
from tests.harness import gpu_rehearsal

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))

from gpu_limits import STAND_IN, Judge
from gpu_profile import TINY
from gpu_session import Session, tiny_model
from gpu_timing import Bench, ColdClock, Watch

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    from triton.runtime.interpreter import InterpretedFunction

    monkeypatch.setattr(InterpretedFunction, "run", InterpretedFunction.run)  # put back after this
    gpu_rehearsal.install(monkeypatch)
    device, watch, report = open_device("cuda"), Watch(), None
    watch.install()
    clock, judge = ColdClock(device, watch), Judge({})
    rest: tuple[Any, ...] = (judge, 1e9, STAND_IN, True)
    yield Bench(device, report, clock, watch, *rest)  # type: ignore[arg-type]
    while gpu_rehearsal.libraries:
        gpu_rehearsal.libraries.pop()._destroy()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_prompts_are_timed_when_their_kernels_are_compiled(bench: Bench, tmp_path: Path) -> None:
    size = replace(TINY.size, model=tiny_model(tmp_path), prefill=16, adapters=1, batch=1)
    session = Session(size, bench, adapters=1)
    with bench.watch.timed("the first time"):
        session.queue_prompts(1)
        session.run_out()
    first = len(bench.watch.while_timed)
    assert first > 0, "prompts must have kernels of their own, or the next lines show nothing"
    for adapters in (1, 0):
        assert session.prefill(adapters).seconds[0] > 0
    session.decode(1, 1)
    assert bench.watch.while_timed[first:] == []
