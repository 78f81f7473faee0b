"""The bench of churn measures what it says, and sees what is kept."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import bench_churn
import pytest

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.seconds
def test_each_way_is_a_row_with_constant_files_and_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["--adapters", "20", "--every", "5", "--save", str(tmp_path / "churn.json")]
    monkeypatch.setattr(sys, "argv", ["bench_churn.py", *args])
    monkeypatch.setattr(bench_churn, "IN_HOST", 5)
    bench_churn.main()
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert [row[:2] for row in rows] == [[way, "20"] for way in bench_churn.WAYS]
    saved = json.loads((tmp_path / "churn.json").read_text())
    assert "commit" in saved["machine"]
    for found in saved["results"]:
        assert found["files"][0] == found["files"][1]
        assert found["threads"][0] == found["threads"][1]
        assert found["evictions"] == (15 if found["way"] == "registered" else 0)
        assert 0 < found["first_ms"] < 60_000


def test_the_slope_is_that_of_what_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[bytes] = []
    monkeypatch.setattr(bench_churn, "use", lambda *_: kept.append(bytes(range(256)) * 4096))
    monkeypatch.setattr(bench_churn, "make_engine", FakeEngine)
    found = bench_churn.measure(tmp_path, [tmp_path] * 20, "unloaded", 2)
    assert found.mb_per_1000 == pytest.approx(1000 * 1.048576, rel=0.1)


class FakeEngine:
    """Has nothing."""

    def __init__(self, base: Path) -> None:
        self.stats = self
        self.adapter_evictions = 0

    def check_integrity(self) -> None:
        pass
