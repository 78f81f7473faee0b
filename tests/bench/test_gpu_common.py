"""The report of a part: what it takes over from a run that was cut short, clocks, crashes."""

from __future__ import annotations

import logging
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
from gpu_timing import Bench, Watch

from multilora.device.cpu import Device
from multilora.errors import ConfigError

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
    assert gpu_files.read(tmp_path / "x.json")["earlier"]["results"] == []


def open_on(path: Path) -> Bench:
    report = make(path)
    watch = Watch(report.content["compiled_while_timed"])
    rest: Any = (Judge(report.content), 1e10, None)
    # Nothing is timed: there is no device and no clock.
    return Bench(None, report, None, watch, *rest)  # type: ignore[arg-type]


class Stopped(BaseException):
    """Ends a run at once, as a signal does."""


def run(path: Path, cases: list[str], stopped: str = "") -> list[str]:
    """The cases that were measured: each gives two results, is slow and compiles meanwhile."""
    bench, done = open_on(path), []

    def work(case: str) -> None:
        done.append(case)
        for part in (1, 2):
            if f"{case} {part}" == stopped:
                raise Stopped
            with bench.watch.timed(f"{case} {part}"):
                bench.watch.compiled.append("k")
            beside = bench.judge.beside(f"{case} {part}", 40 / part, 10)
            bench.report.add(kind="lora", part=part, **beside)

    with suppress(Stopped):
        for case in cases:
            bench.run(case, partial(work, case))
        bench.close("")
    return done


def test_a_case_that_an_earlier_run_measured_is_not_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    assert run(path, ["a", "b"]) == ["a", "b"]
    assert run(path, ["b", "c"]) == ["c"]
    assert run(path, ["a", "b", "c"]) == []
    check_whole(path, "abc")


def check_whole(path: Path, cases: str) -> None:
    """All that was found of these cases is there, and once."""
    found = gpu_files.read(path)
    names = sorted(result["case_name"] for result in found["results"])
    assert names == sorted(cases * 2)
    assert sorted(slow["case"] for slow in found["slow"]) == [f"{case} 1" for case in cases]
    timed = sorted(entry["timed"] for entry in found["compiled_while_timed"])
    assert timed == [f"{case} {part}" for case in cases for part in (1, 2)]
    assert found["earlier"] == {"results": [], "slow": [], "compiled_while_timed": []}


def test_a_case_that_was_ended_between_its_results_is_done_again(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    assert run(path, ["a", "b"], stopped="b 2") == ["a", "b"]
    assert len(gpu_files.read(path)["results"]) == 3
    assert run(path, ["a", "b", "c"]) == ["b", "c"]
    check_whole(path, "abc")


def test_a_case_that_failed_is_done_again(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    bench = open_on(path)

    def fail() -> None:
        bench.report.add(part=1)
        raise KeyError

    bench.run("a", fail)
    assert run(path, ["a"]) == ["a"]
    check_whole(path, "a")
    assert "failures" not in gpu_files.read(path)


def test_clocks_and_counts_of_earlier_runs_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    bench = open_on(path)
    bench.report.content["clocks"].append([1, "1980 MHz"])
    bench.watch.compiled += ["k", "k"]
    bench.close("")
    again = open_on(path)
    again.watch.compiled.append("k")
    again.close("")
    found = gpu_files.read(path)
    assert found["clocks"] == [[1, "1980 MHz"]]
    assert found["compiled"] == 3


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


def test_a_part_without_a_gpu_says_so_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(name: str) -> Device:
        raise ConfigError(f"there is no {name}")

    monkeypatch.setattr(gpu_common, "open_device", refuse)
    monkeypatch.setattr(sys, "argv", ["gpu_smoke.py", "--out", str(tmp_path / "smoke.json")])
    with pytest.raises(SystemExit) as ended:
        gpu_common.parse("A part.")
    assert ended.value.code == 2
    assert capsys.readouterr().out == "no GPU: there is no cuda\n"
    assert not any(tmp_path.iterdir())


def test_what_the_library_logs_is_kept(tmp_path: Path) -> None:
    report, logger = make(tmp_path / "x.json"), logging.getLogger("multilora.of_a_test")
    handler = gpu_common.Log(report.content["log"])
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        logger.info("%d graphs", 7)
        logger.debug("nothing")
    finally:
        logger.removeHandler(handler)
    report.write()
    ((when, text),) = make(tmp_path / "x.json").content["log"]
    assert text == "7 graphs"
    assert abs(when - time.time()) < 60
