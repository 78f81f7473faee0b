"""Medians, ratios, verdicts, and results that are measured in parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from bench_cpu import merge
from report import gap_summary, lines, lora_cost, table


def result(*timings: tuple[str, str, float], **changed: Any) -> dict[str, Any]:
    """A raw result in which (peer, case) ran at so many tokens per second."""
    return {
        **{"work": "tiny", "precision": "fp32", "threads": 1, "machine": {"commit": "c"}},
        **{"requests": 2, "prompt": 8, "new": 5, "versions": {}, "tokens": {}, "gaps": {}},
        "peaks": {"threads": 1, "fma": 1.0, "bf16_dot": 0, "int8_dot": 0, "read": 1.0},
        "timings": [
            {"peer": peer, "case": case, "rate": rate, "seconds": 10 / rate, "first_last": 0.1,
             "decode": 2 * rate}
            for peer, case, rate in timings
        ],
    } | changed  # fmt: skip


def test_ratios_are_of_medians() -> None:
    ours = [("ours", "base", rate) for rate in (90.0, 100.0, 500.0)]
    theirs = [("peft", "base", rate) for rate in (10.0, 50.0, 60.0)]
    found = {line.peer: line for line in lines([result(*ours, *theirs)])}
    assert found["peft"].ratio == pytest.approx(100 / 50)
    assert found["ours"].ratio is None


def test_a_rate_at_the_floor_is_all_of_it() -> None:
    (line,) = lines([result(("ours", "base", 1.0))])
    at_floor = 2 * 5 / line.floor_seconds.total
    (line,) = lines([result(("ours", "base", at_floor))])
    assert line.floor == pytest.approx(1.0)


def test_near_ties_are_no_differences() -> None:
    summary = gap_summary([[0.0, 1e-5], [0.0, 0.5]])
    assert summary == {"tokens": 4, "same": 0.5, "others": 1, "largest": 0.5}
    assert gap_summary([[0.0, 1e-5]])["others"] == 0


def test_the_table_tells_wrong_tokens_from_right_ones() -> None:
    good, bad = gap_summary([[0.0, 0.0]]), gap_summary([[0.0, 0.5]])
    gaps = {"ours base": good, "peft base": bad}
    text = table([result(("ours", "base", 1.0), ("peft", "base", 1.0), gaps=gaps)])
    assert "| all" in text
    assert "50.0%, gap 0.5" in text


def test_lora_cost_is_what_it_adds_over_what_the_floor_adds() -> None:
    slow, fast = ("ours", "distinct", 10.0), ("ours", "base", 20.0)
    (_, _, row) = lora_cost([result(slow, fast)]).splitlines()
    assert float(row.split("|")[4]) == pytest.approx((2 / 20 - 2 / 40) * 1e3)


def test_parts_of_a_result_merge_and_new_ones_win(tmp_path: Path) -> None:
    import json

    path = tmp_path / "raw.json"
    old = result(
        ("ours", "base", 1.0), ("peft", "base", 2.0), gaps={"ours base": 1, "peft base": 2}
    )
    path.write_text(json.dumps(old))
    found = merge(path, result(("ours", "base", 3.0)))
    assert sorted((t["peer"], t["rate"]) for t in found["timings"]) == [("ours", 3), ("peft", 2)]
    assert found["gaps"] == {"peft base": 2}
    other = merge(path, result(("ours", "base", 3.0), machine={"commit": "d"}))
    assert [t["peer"] for t in other["timings"]] == ["ours"]
