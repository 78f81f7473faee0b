"""Part "engine" of `bench/gpu.py`, where packages are missing; the rehearsal runs it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import gpu_engine

if TYPE_CHECKING:
    import pytest


def test_without_peft_the_comparison_is_left_out_and_nothing_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_engine, "missing", lambda names: ["peft"])
    bench: Any = SimpleNamespace(report=SimpleNamespace(content={}))
    gpu_engine.peft(gpu_engine.TINY, bench)
    assert bench.report.content == {"left_out_for_want_of": ["peft"]}
    assert capsys.readouterr().out == "peft left out: missing peft\n"
