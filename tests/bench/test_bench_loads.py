"""The bench of loads measures what it says."""

from __future__ import annotations

import sys

import bench_loads
import pytest


@pytest.mark.seconds
def test_every_way_and_rank_is_a_row(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_loads.py", "--shape", "tiny", "--adapters", "4"])
    bench_loads.main()
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows[1:4]] == list(bench_loads.WAYS)
    assert [row[0] for row in rows[6:]] == ["8", "16", "32", "64"]
    assert all(0 < float(value) < 60_000 for row in [*rows[1:4], *rows[6:]] for value in row[1:])
