"""The bench of registered adapters measures what it says."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import bench_registered
import pytest

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.seconds
def test_tiers_hold_what_fits_and_the_rest_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["--shape", "tiny", "--registered", "5,40", "--in-host", "20", "--ranks", "8,16"]
    size = ["--seconds", "0.1", "--rounds", "1", "--save", str(tmp_path / "found.json")]
    monkeypatch.setattr(sys, "argv", ["bench_registered.py", *args, *size])
    monkeypatch.setattr(bench_registered, "LENGTHS", (2, 6))
    bench_registered.main()
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    laws = ("zipf", "uniform")
    assert [row[:3] for row in rows[1:7]] == [
        [law, *sizes] for law in laws for sizes in (["5", "5"], ["40", "40"], ["40", "20"])
    ]
    results = json.loads((tmp_path / "found.json").read_text())["results"]
    loops, firsts = results[:6], results[6:]
    for found in loops:
        shares = [found[place] for place in ("device", "in_host", "disk")]
        assert sum(shares) == pytest.approx(1)
        assert (found["disk"] > 0) == (found["loads"] > 0) == (found["host"] < found["registered"])
        assert (found["device"] < 1) == (found["registered"] > bench_registered.RESIDENT)
        assert found["drop"] == 0 or found["registered"] > 5
    assert [found["rank"] for found in firsts] == [8, 16]
    assert all(0 < found[place] < 60_000 for found in firsts for place in bench_registered.PLACES)
