"""The table of what LoRA costs has what it says."""

from __future__ import annotations

import sys

import bench_lora_tax
import pytest


@pytest.mark.seconds
def test_each_way_is_a_row_beside_the_one_without(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["--shape", "tiny", "--precision", "fp32", "--batch", "1,4", "--runs", "1"]
    monkeypatch.setattr(sys, "argv", ["bench_lora_tax.py", *args, "--steps", "4"])
    bench_lora_tax.main()
    rows = [
        [cell.strip() for cell in line.split("|")] for line in capsys.readouterr().out.splitlines()
    ]
    found = [(row[3], row[4], row[9]) for row in rows[2:]]
    assert [row[:2] for row in found] == [
        *(("1", way) for way in ("without", "unused", "rank 16", "rank 64")),
        *(("4", way) for way in ("without", "unused", "rank 16", "distinct")),
    ]
    assert found[0][2] == "+0.0%"
    assert float(found[2][2][1:-1]) * 4 == pytest.approx(float(found[3][2][1:-1]), abs=0.5)
