"""The bench of engines runs every one that is installed, on the same work to the same tokens."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness.paths import ROOT

BENCH = ROOT / "bench"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="the floor is measured by a C++ program")
def test_ours_and_peft_run_the_same_work_to_the_same_tokens(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    command = [sys.executable, BENCH / "bench_cpu.py", "all", "--work", "tiny", "--root", tmp_path]
    options = ["--peers", "ours,peft,mistralrs", "--precision", "fp32", "--repeat", "1"]
    size = ["--requests", "4", "--prompt", "8", "--new", "4", "--threads", "1"]
    save = tmp_path / "saved.json"
    done = subprocess.run(
        [*command, *options, *size, "--save", save], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "mistralrs: skipped" in done.stdout
    (result,) = json.loads(save.read_text())
    assert {(t["peer"], t["case"]) for t in result["timings"]} == {
        (peer, case) for peer in ("ours", "peft") for case in ("distinct", "identical", "base")
    }
    assert {gaps["others"] for gaps in result["gaps"].values()} == {0}
    assert "tokens" not in result
