"""Part "tests" of `bench/gpu.py`: how tests are dealt out, and what becomes of those that die."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import gpu_common
import gpu_tests
import pytest
from gpu_common import Report

from multilora.device.cpu import Device

STATE = {"source": "1", "gpu": "x"}
MARK = "import os, time\nimport pytest\npytestmark = pytest.mark.gpu\n"
FILES = {
    "test_gpu_engine.py": "def test_last(): pass\n",
    "test_gpu_kernels.py": """
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("size", [1, 2])
def test_op(dtype, size): assert (dtype, size) != ("fp16", 2), "wrong by 3"
def test_skipped(): pytest.skip("not here")
@pytest.fixture
def broken(): raise KeyError("no fixture")
def test_broken(broken): pass
""",
}


@pytest.fixture
def report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Report:
    monkeypatch.setattr(gpu_common, "machine", lambda device: {"device": "none"})
    return Report(tmp_path / "tests.json", Device(), 100, STATE)


def run(
    folder: Path, report: Report, files: dict[str, str], *, count: int = 1, **options: Any
) -> dict[str, str]:
    """The outcome of each test by its name."""
    (folder / "suite").mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / "suite" / name).write_text(MARK + text)
    more = {"chosen": "", "hangs": 60.0, "more": [], **options}
    gpu_tests.run(folder / "suite", report, count=count, **more)
    results = report.content["results"]
    return {result["test"].rpartition("::")[2]: result["outcome"] for result in results}


def test_every_outcome_is_kept_and_kernels_come_first(tmp_path: Path, report: Report) -> None:
    found = run(tmp_path, report, FILES)
    assert found == {
        "test_op[1-bf16]": "passed",
        "test_op[2-bf16]": "passed",
        "test_op[1-fp16]": "passed",
        "test_op[2-fp16]": "failed",
        "test_skipped": "skipped",
        "test_broken": "failed",
        "test_last": "passed",
    }
    assert list(found)[-1] == "test_last"
    assert report.status == 1
    first, second = sorted(report.content["failures"], reverse=True)
    assert "test_op[2-fp16] failed: AssertionError: wrong by 3 assert (" in first
    assert "\n" not in first
    assert "no fixture" in second
    assert report.content["left_out"] == 0
    written = json.loads((tmp_path / "tests.json").read_text())["results"]
    assert [result["outcome"] for result in written] == list(found.values())
    assert all(result["seconds"] >= 0 for result in written)


def test_shares_are_dealt_by_what_compiles_the_same_kernels(tmp_path: Path) -> None:
    (tmp_path / "test_gpu_kernels.py").write_text(MARK + FILES["test_gpu_kernels.py"])
    groups = gpu_tests.collect(tmp_path)
    shares = [[test.rpartition("::")[2] for test in share] for share in gpu_tests.deal(groups, 2)]
    assert shares == [
        ["test_op[1-bf16]", "test_op[2-bf16]", "test_skipped"],
        ["test_op[1-fp16]", "test_op[2-fp16]", "test_broken"],
    ]
    (chosen,) = gpu_tests.collect(tmp_path, "2-bf16")  # paths match as well
    assert [test.rpartition("::")[2] for test in chosen] == ["test_op[2-bf16]"]
    assert gpu_tests.deal(groups[:1], 5) == groups[:1]


def test_what_ends_or_spoils_a_process_costs_one_test(tmp_path: Path, report: Report) -> None:
    """After an illegal access nothing works in a process: the other tests get another one."""
    text = """
import torch
def lost(): raise RuntimeError("an illegal memory access was encountered")
def test_dies(): os._exit(7)
def test_hangs(): time.sleep(999)
def test_spoils():
    torch.cuda.is_initialized, torch.cuda.synchronize = lambda: True, lost
    lost()
def test_passes(): assert not torch.cuda.is_initialized()
"""
    found = run(tmp_path, report, {"test_gpu_kernels.py": text}, hangs=2)
    assert found == {
        "test_dies": "crashed",
        "test_hangs": "crashed",
        "test_spoils": "failed",
        "test_passes": "passed",
    }
    dies, hangs, spoils = report.content["failures"]
    assert "test_dies crashed: the process ended with 7" in dies
    assert "a test that ran for more than 2 s" in hangs
    assert "illegal memory access" in spoils
    assert report.content["left_out"] == 0


def test_tests_without_time_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_common, "machine", lambda device: {"device": "none"})
    path = tmp_path / "tests.json"
    # The first test ends at once, the second one never; time is up when the first has ended.
    text = "def test_a(): pass\ndef test_b(): time.sleep(99)\ndef test_c(): pass\n"
    report = Report(path, Device(), 1e6, STATE)
    left = property(lambda self: 0 if self.content["results"] else 100)
    monkeypatch.setattr(Report, "seconds_left", left)
    assert run(tmp_path, report, {"test_gpu_kernels.py": text}) == {"test_a": "passed"}
    assert report.content["left_out"] == 2
    names = [test.rpartition("::")[2] for test in report.content["left_out_cases"]]
    assert names == ["test_b", "test_c"]
    assert report.status == 0
    report.write()
    # The next run goes on with those.
    again = Report(path, Device(), 1e6, STATE)
    monkeypatch.setattr(Report, "seconds_left", 100)
    text = text.replace("def test_a(): pass", "def test_a(): assert False").replace("99", "0")
    found = run(tmp_path, again, {"test_gpu_kernels.py": text})
    assert found == {"test_a": "passed", "test_b": "passed", "test_c": "passed"}
    assert again.content["left_out"] == 0


def test_a_process_that_cannot_begin_is_a_failure(
    tmp_path: Path, report: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert run(tmp_path, report, {"test_gpu_kernels.py": "def test_a(): pass\n"}) == {}
    (why,) = report.content["failures"]
    assert why.startswith("1 tests did not run: the process ended with 1")
    assert report.content["left_out"] == 1


def test_a_file_that_cannot_be_collected_is_an_error(tmp_path: Path, report: Report) -> None:
    with pytest.raises(RuntimeError, match="no such module"):
        run(tmp_path, report, {"test_gpu_kernels.py": "raise ImportError('no such module')\n"})


def test_a_failure_is_told_in_a_line() -> None:
    raised = (
        "x = 3\n>   check(x)\nE   AssertionError: not close!\nE   \nE   off by 1.0\na.py:3: Error"
    )
    assert gpu_tests.gist(raised) == "AssertionError: not close! off by 1.0"
    assert gpu_tests.gist("ended with 7:\n  log") == "ended with 7: log"
    long = gpu_tests.gist(f"ended with 7: {'x' * 900} the last words")
    assert long.startswith("ended with 7: x")
    assert long.endswith(" the last words")
    assert len(long) < 400
