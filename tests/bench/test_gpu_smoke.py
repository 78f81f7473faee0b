"""Part "smoke" of `bench/gpu.py`, on a CPU in the GPU's place: right is right, wrong is wrong."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import gpu_common
import gpu_smoke
import pytest
import torch
from gpu_common import Report
from gpu_smoke import Check

import multilora_kernels as mk
from multilora.device.cpu import Device

if TYPE_CHECKING:
    from pathlib import Path


def test_right_kernels_are_right(tmp_path: Path) -> None:
    found = {
        **gpu_smoke.lora(Device(), 160),
        **gpu_smoke.attention(Device(), 96),
        **gpu_smoke.engine(tmp_path, "cpu", **gpu_smoke.SHAPE),
    }
    assert set(found) == {"lora", "attention", "engine, prompts", "engine, decode"}
    for name, (error, limit) in found.items():
        assert 0 < error < limit, name


@pytest.mark.parametrize("change", [0.9, math.nan])
def test_wrong_kernels_are_wrong(monkeypatch: pytest.MonkeyPatch, change: float) -> None:
    """Off by a tenth, or by a NaN, in one row."""
    lora, attention = mk.lora_, mk.paged_attention

    def wrong_lora(y: torch.Tensor, *rest: Any) -> None:
        lora(y, *rest)
        y[3] *= change

    def wrong_attention(*args: Any, **options: Any) -> torch.Tensor:
        found = attention(*args, **options)
        found[0] *= change
        return found

    monkeypatch.setattr(mk, "lora_", wrong_lora)
    monkeypatch.setattr(mk, "paged_attention", wrong_attention)
    for found in (gpu_smoke.lora(Device(), 160), gpu_smoke.attention(Device(), 96)):
        ((error, limit),) = found.values()
        assert not error <= limit


def test_what_is_wrong_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_common, "machine", lambda device: {"device": "none"})
    report = Report(tmp_path / "smoke.json", Device(), 100, {"source": "1", "gpu": "x"})

    def work(name: str, error: float) -> list[str]:
        return gpu_smoke.check(name, lambda: {name: Check(error, 0.02)}, report)

    def fail() -> dict[str, Check]:
        raise ZeroDivisionError("of a kernel")

    assert work("a", 0.01) == ["a right, 0.01 of 0.02"]
    assert report.status == 0
    assert work("b", 0.5) == ["b WRONG, 0.5 of 0.02"]
    assert work("c", math.nan) == ["c WRONG, nan of 0.02"]
    assert gpu_smoke.check("d", fail, report) == ["d ZeroDivisionError"]
    assert report.status == 1
    assert [result["right"] for result in report.content["results"]] == [True, False, False]
    first, _, last = report.content["failures"]
    assert first == "b is off by 0.5, at most 0.02 is rounding"
    assert last.startswith("d: Traceback")
