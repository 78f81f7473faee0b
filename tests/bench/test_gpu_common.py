"""The report of a part: what it takes over from a run that was cut short, clocks, crashes."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import gpu_common
import gpu_files
import pytest
from gpu_common import Report
from gpu_limits import Judge
from gpu_timing import Bench

from multilora.device.cpu import Device

if TYPE_CHECKING:
    from pathlib import Path

STATE = {"source": "1", "gpu": "x"}


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_common, "machine", lambda device: {"device": "none"})
    monkeypatch.setattr(gpu_common, "clocks", lambda: "")


def make(path: Path, **state: str) -> Report:
    return Report(path, Device(), 100, {**STATE, **state})


def test_a_run_goes_on_where_the_last_one_was_cut_short(tmp_path: Path) -> None:
    first = make(tmp_path / "x.json")
    for batch in (1, 2, 3):
        first.add(kind="lora", batch=batch, sites=("a", "b"), seconds=batch / 10)
    second = make(tmp_path / "x.json")
    found = second.known(kind="lora", batch=2, sites=("a", "b"))
    assert found is not None
    assert found["seconds"] == 0.2
    assert second.known(kind="lora", batch=2) is None, "it is taken over already"
    assert second.known(kind="lora", batch=4) is None
    assert second.known(kind="lora", rank=8) is None
    second.add(kind="lora", batch=4)
    third = make(tmp_path / "x.json")  # what the second did not ask for is not lost
    assert [bool(third.known(batch=batch)) for batch in (1, 2, 3, 4)] == [True] * 4
    third.write()
    assert len(gpu_files.read(tmp_path / "x.json")["results"]) == 4
    assert gpu_files.read(tmp_path / "x.json")["earlier"] == []


def test_a_case_that_an_earlier_run_measured_is_not_measured_again(tmp_path: Path) -> None:
    def run(cases: list[str]) -> list[str]:
        report, done = make(tmp_path / "x.json"), []
        judge = Judge(report.content)

        def work(case: str) -> None:
            done.append(case)
            for part in (1, 2):
                report.add(kind="lora", part=part, **judge.beside(f"{case} {part}", 40 / part, 10))

        bench: Any = Bench(None, report, None, None, judge, 1e10, None)  # type: ignore[arg-type]
        for case in cases:
            bench.run(case, partial(work, case))
        report.write()
        return done

    assert run(["a", "b"]) == ["a", "b"]
    assert run(["b", "c"]) == ["c"]
    assert run(["a", "b", "c"]) == []
    found = gpu_files.read(tmp_path / "x.json")
    names = sorted(result["case_name"] for result in found["results"])
    assert names == ["a", "a", "b", "b", "c", "c"]
    assert sorted(slow["case"] for slow in found["slow"]) == ["a 1", "b 1", "c 1"]
    assert found["earlier_slow"] == []


def test_a_case_that_was_ended_between_two_results_is_measured_again(tmp_path: Path) -> None:
    def run(last: int) -> list[int]:
        report, done = make(tmp_path / "x.json"), []
        judge = Judge(report.content)

        def work() -> None:
            for part in (1, 2):
                if part > last:
                    raise KeyboardInterrupt
                done.append(part)
                report.add(part=part, **judge.beside(f"part {part}", 40 / part, 10))

        bench: Any = Bench(None, report, None, None, judge, 1e10, None)  # type: ignore[arg-type]
        with suppress(KeyboardInterrupt):
            bench.run("group", partial(bench.run, "peft", work))
        report.write()
        return done

    assert run(1) == [1]
    assert run(2) == [1, 2]
    assert run(2) == []
    found = gpu_files.read(tmp_path / "x.json")
    assert [result["part"] for result in found["results"]] == [1, 2]
    assert found["cases_done"] == ["peft"]
    assert len(found["slow"]) == 1


def test_what_was_seen_beside_the_cases_is_kept(tmp_path: Path) -> None:
    first = make(tmp_path / "x.json")
    first.content["clocks"].append([1, "1980"])
    first.content["compiled_while_timed"].append("a: _shrink")
    first.write()
    second = make(tmp_path / "x.json")
    assert second.content["clocks"] == [[1, "1980"]]
    assert second.content["compiled_while_timed"] == ["a: _shrink"]


@pytest.mark.parametrize("other", ["complete", "source", "gpu"])
def test_other_results_are_not_taken_over(tmp_path: Path, other: str) -> None:
    make(tmp_path / "x.json").add(batch=1)
    if other == "complete":
        content = gpu_files.read(tmp_path / "x.json")
        gpu_files.write(tmp_path / "x.json", {**content, "complete": True})
    again = make(tmp_path / "x.json", **({} if other == "complete" else {other: "another"}))
    assert again.known(batch=1) is None
    assert gpu_files.read(tmp_path / "x.json")["results"] == []


def test_what_is_left_out_is_named(tmp_path: Path) -> None:
    report = make(tmp_path / "x.json")
    report.leave_out(("a", 1))
    report.leave_out("b")
    report.write()
    found = gpu_files.read(tmp_path / "x.json")
    assert found["left_out"] == 2
    assert found["left_out_cases"] == ["('a', 1)", "b"]
    assert report.status == 0


def test_a_part_that_raises_says_so_in_its_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = make(tmp_path / "x.json")
    try:
        raise ValueError("no such thing")
    except ValueError:
        report.crash(*sys.exc_info())  # type: ignore[arg-type]
    found = gpu_files.read(tmp_path / "x.json")
    assert "test_gpu_common.py" in found["crashed"]
    assert found["failures"] == ["the part ended by ValueError: no such thing"]
    assert report.status == 1
    assert "Traceback" in capsys.readouterr().err


def test_clocks_are_read_in_the_background(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(gpu_common, "clocks", lambda: asked.append(1) or "1980 MHz")
    monkeypatch.setattr(gpu_common, "CLOCKS_EVERY", 0.05)
    report = make(tmp_path / "x.json")
    for _ in range(200):
        report.write()
    assert len(asked) < 100, "not with every write"
    for _ in range(200):
        if len(report.content["clocks"]) >= 3:
            break
        time.sleep(0.05)
    monkeypatch.setattr(gpu_common, "CLOCKS_EVERY", 1e6)  # the thread rests from now on
    when, said = report.content["clocks"][0]
    assert abs(when - time.time()) < 60
    assert said == "1980 MHz"
