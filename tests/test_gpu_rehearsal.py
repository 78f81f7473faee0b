"""`make gpu`, rehearsed from start to end without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
PARTS = {"smoke": 4, "tests": 88, "profile": 8, "kernels": 130, "engine": 19, "tune": 2}
"""And how many results each has at least."""


def rehearse(out: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "bench" / "gpu.py"), "--rehearse"],
        env={**os.environ, "OUT": str(out), **environment},
        cwd=out,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.timeout(7500)
def test_every_part_runs_from_a_bare_checkout(tmp_path: Path) -> None:
    for name in ("transformers", "peft", "triton"):
        pytest.importorskip(name)
    done = rehearse(tmp_path, PARTS=",".join(PARTS))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("all right\n")
    found = {part: json.loads((tmp_path / f"{part}.json").read_text()) for part in PARTS}
    for part, count in PARTS.items():
        assert len(found[part]["results"]) >= count
        assert found[part]["left_out"] == 0
        assert found[part]["complete"]
        assert found[part]["machine"]["device"] == "a fake GPU"
        assert found[part]["machine"]["versions"]["torch"]
    for part in ("profile", "kernels", "engine"):
        check_measurements(found[part])
    kinds = {result["kind"] for result in found["engine"]["results"]}
    assert kinds == {"decode", "prefill", "punica", "peft decode"}
    assert {result["right"] for result in found["smoke"]["results"]} == {True}
    assert (tmp_path / "sm90.json").is_file()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_wrong_kernel_is_found_and_named(tmp_path: Path) -> None:
    """By `smoke` within its seconds, by `tests`, and in the last lines that are printed."""
    pytest.importorskip("triton")
    chosen = "(test_lora and bfloat16 and distinct) or (test_attention and bfloat16)"
    done = rehearse(
        tmp_path, PARTS="smoke,tests", TESTS=chosen, MULTILORA_TEST_FAULT="page weights"
    )
    assert done.returncode == 1, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == "WRONG: smoke, tests"
    (smoke,) = (line for line in lines if line.startswith("smoke: failed"))
    assert "lora is off by" in smoke
    (tests,) = (line for line in lines if line.startswith("tests: failed"))
    assert "test_lora" in tests
    assert "test_attention" not in tests
    found = json.loads((tmp_path / "smoke.json").read_text())["results"]
    right = {result["case"]: result["right"] for result in found}
    assert right == {
        "lora": False,
        "attention": True,
        "engine, prompts": False,
        "engine, decode": False,
    }
    outcomes = {
        (result["test"].partition("::")[2].partition("[")[0], result["outcome"])
        for result in json.loads((tmp_path / "tests.json").read_text())["results"]
    }
    assert ("test_lora", "failed") in outcomes  # where a batch has a mix
    assert ("test_attention", "failed") not in outcomes
    assert ("test_attention", "passed") in outcomes


def check_measurements(found: dict[str, Any]) -> None:
    """Nothing was compiled while a clock ran, and each result stands beside its prediction."""
    assert found["compiled"] > 0
    assert found["compiled_while_timed"] == []
    assert found["slow"] == []
    for result in found["results"]:
        assert result["kind"] == "peft decode" or "measured_to_predicted" in result, result
        known = [kernel for kernel in result.get("kernels", []) if "predicted_count" in kernel]
        assert all(kernel["count"] == kernel["predicted_count"] for kernel in known), known
        wanted = (9, 17) if result["kind"] == "step" else (0,)  # without LoRA, with it
        assert len(known) in wanted, result
