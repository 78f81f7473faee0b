"""The bench of experts on one text measures what it says."""

from __future__ import annotations

import sys

import bench_alora
import pytest


@pytest.mark.seconds
def test_only_activated_experts_share_the_context(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["--experts", "3", "--context", "160", "--runs", "1", "--layers", "1"]
    monkeypatch.setattr(sys, "argv", ["bench_alora.py", *args])
    bench_alora.main()
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert [row[:3] for row in rows] == [["3", "plain", "570"], ["3", "activated", "250"]]
    assert all(0 < float(value) < 60_000 for row in rows for value in row[3:])
