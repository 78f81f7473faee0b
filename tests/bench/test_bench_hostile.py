"""The bench of hostile files ends, counts all of them and finds nothing raw."""

from __future__ import annotations

import sys
from collections import Counter
from typing import TYPE_CHECKING, Any

import bench_hostile
import pytest
from bench_hostile import Tally

from multilora.errors import RequestError

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.seconds
def test_some_of_each_are_typed_or_served(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_hostile.logging, "disable", lambda _: None)
    sizes = ("--adapters", "12", "--bases", "6", "--templates", "4")
    monkeypatch.setattr(sys, "argv", ["bench_hostile.py", *sizes])
    assert bench_hostile.main() == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    found = {row[0]: [int(count) for count in row[1:5]] for row in rows if row[0] in KINDS}
    assert {name: counts[0] for name, counts in found.items()} == KINDS
    assert all(sum(counts[1:]) == counts[0] and counts[3] == 0 for counts in found.values())


KINDS = {"adapters": 12, "bases": 6, "templates": 4}


def test_what_is_raw_or_beyond_a_limit_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(error: Exception) -> Any:
        raise error

    tally = Tally(most_ms=1e6, most_mb=20)
    tally.run("good", lambda: None)
    tally.run("refused", lambda: fails(RequestError("x")))
    tally.run("raw", lambda: fails(KeyError("y")))
    assert tally.ends == Counter(served=1, typed=1, raw=1)
    assert "  raw: KeyError: 'y'" in capsys.readouterr().out
    tally.run("large", lambda: bytearray(1 << 26).count(1))
    assert "  large: " in capsys.readouterr().out
