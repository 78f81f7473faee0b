"""The bench of those who wait measures what it says."""

from __future__ import annotations

import sys

import bench_waiting
import pytest


@pytest.mark.seconds
def test_all_but_two_wait(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It asserts itself how many do."""
    monkeypatch.setattr(sys, "argv", ["bench_waiting.py", "--waiting", "0,30", "--steps", "3"])
    bench_waiting.main()
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert [row[0] for row in rows] == ["0", "30"]
    assert all(0 < float(value) < 10_000 for row in rows for value in row[1:])
