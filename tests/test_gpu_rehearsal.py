"""`make gpu`, rehearsed from start to end without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PARTS = {"tests": 88, "kernels": 130, "engine": 20}  # and how many results each has at least


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_part_runs_from_a_bare_checkout(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench" / "gpu.py"), "--rehearse"],
        env={**os.environ, "OUT": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for part, count in PARTS.items():
        found = json.loads((tmp_path / f"{part}.json").read_text())
        assert len(found["results"]) >= count
        assert found["left_out"] == 0
        assert found["machine"]["device"] == "a fake GPU"
        assert found["machine"]["versions"]["torch"]
    kinds = {result["kind"] for result in found["results"]}
    assert kinds == {"decode", "prefill", "punica", "peft decode"}


def test_an_unknown_part_is_named(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench" / "gpu.py")],
        env={**os.environ, "PARTS": "tests,kernel", "OUT": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "unknown part 'kernel'; PARTS may name tests, kernels, engine" in done.stderr
