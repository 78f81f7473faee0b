"""Part "tests" of `bench/gpu.py`: tests/gpu on the real device, their outcomes as JSON.

Several processes share the GPU, because most of the time goes into compiling kernels. Tests of
kernels come first, those of whole engines last. A process that dies or hangs costs the test that it
was at; another one goes on with its others.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gpu_process
from gpu_common import ROOT, Report, parse, say
from gpu_pytest import options_of

ORDER = ("kernels", "sampler", "", "engine")  # by a word in the file's name
PROCESSES = 6
MEMORY = 0.9  # of the GPU's, for all of them
HANGS = 150  # seconds: a test that runs for longer is ended
POLL = 0.1  # seconds
RESERVE = 3  # seconds before the end in which the processes are ended


class Collected:
    """A pytest plugin that lists tests, in groups that compile the same kernels."""

    def __init__(self) -> None:
        self.groups: dict[Any, list[str]] = {}

    def pytest_collection_finish(self, session: Any) -> None:
        for item in sorted(session.items, key=lambda item: place(item.path.stem)):
            dtype = item.callspec.params.get("dtype") if hasattr(item, "callspec") else None
            key = item.nodeid if dtype is None else (item.path, item.originalname, dtype)
            self.groups.setdefault(key, []).append(item.nodeid)


def place(name: str) -> int:
    """The place of a file of tests among the others."""
    words = [i for i, word in enumerate(ORDER) if word and word in name]
    return words[0] if words else ORDER.index("")


def collect(folder: Path, chosen: str = "") -> list[list[str]]:
    """The GPU tests in a folder, in groups, in the order in which they should run.

    `chosen` is an expression as for pytest's -k. RuntimeError if pytest cannot collect them.
    """
    import pytest

    found, said = Collected(), io.StringIO()
    with contextlib.redirect_stdout(said):
        options = ["--collect-only", "-k", chosen, *options_of(folder)]
        code = int(pytest.main(options, plugins=[found]))
    if code:
        raise RuntimeError(f"no tests, pytest ended with {code}: {said.getvalue()[-3000:]}")
    return list(found.groups.values())


def deal(groups: list[list[str]], count: int) -> list[list[str]]:
    """Shares for so many processes: each group goes to the one that has least by then."""
    shares: list[list[str]] = [[] for _ in range(count)]
    for group in groups:
        min(shares, key=len).extend(group)
    return [share for share in shares if share]


class Worker:
    """A process of `gpu_pytest.py`, started again while it gets on."""

    def __init__(self, name: str, tests: list[str], command: list[str], report: Report) -> None:
        self.todo, self._command, self._report = tests, command, report
        self._files = {kind: Path(f"{name}.{kind}") for kind in ("tests", "events", "log")}
        self._begun = ("", 0.0)  # the test that runs, and since when
        self._start()

    def _start(self) -> None:
        self._before, self._read, self._begun = len(self.todo), 0, ("", time.monotonic())
        self._files["tests"].write_text(json.dumps(self.todo))
        self._files["events"].write_text("")
        options = ["--tests", str(self._files["tests"]), "--events", str(self._files["events"])]
        with self._files["log"].open("w") as log:
            self._process = subprocess.Popen(
                [*self._command, *options],
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=gpu_process.bound(),
            )

    def poll(self, hangs: float) -> bool:
        """Takes what is there by now; whether more is to come."""
        status: object = self._process.poll()  # before the events: nothing comes after it
        self._take_events()
        if not self.todo:
            self.stop()
            return False
        test, since = self._begun
        if status is None and test and time.monotonic() - since > hangs:
            self.stop()
            status = f"a test that ran for more than {hangs:.0f} s"
        if status is None:
            return True
        why = f"the process ended with {status}: {self._log()}"
        if test := self._begun[0]:  # it was that test's doing
            self._finish({"test": test, "outcome": "crashed", "text": why})
        elif len(self.todo) == self._before:  # it did not even begin
            self._report.fail(f"{len(self.todo)} tests did not run: {why}")
            return False
        if self.todo:
            self._start()
        return bool(self.todo)

    def stop(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait()
        self._take_events()

    def _take_events(self) -> None:
        with self._files["events"].open("rb") as file:
            file.seek(self._read)
            lines = file.readlines()
        for line in lines:
            if not line.endswith(b"\n"):  # it is being written
                break
            self._read += len(line)
            event = json.loads(line)
            self._begun = (event.get("begin", ""), time.monotonic())
            if "test" in event:
                self._finish(event)

    def _finish(self, event: dict[str, Any]) -> None:
        self.todo.remove(event["test"])
        self._report.add(**event)
        judge(event, self._report)

    def _log(self) -> str:
        return self._files["log"].read_text(errors="replace")[-2000:]


def judge(result: dict[str, Any], report: Report) -> None:
    """Notes a test that failed, or that ended its process."""
    if result["outcome"] not in ("passed", "skipped"):
        report.fail(f"{result['test']} {result['outcome']}: {gist(result['text'])}")


def gist(text: str) -> str:
    """What pytest says of a failure, in a line: what was raised, or the text's start and end."""
    raised = [line[1:] for line in text.splitlines() if line.startswith("E ")]
    line = " ".join(" ".join(raised or [text]).split())
    if len(line) <= 300:
        return line
    return f"{line[:300]}..." if raised else f"{line[:100]} ... {line[-200:]}"


def run(
    folder: Path, report: Report, *, chosen: str, count: int, hangs: float, more: list[str]
) -> None:
    """Runs the tests of a folder in `count` processes, with `more` options for each."""
    waiting = []
    for group in collect(folder, chosen):
        known = {test: report.known(test=test) for test in group}
        waiting.append([test for test, result in known.items() if result is None])
        for result in filter(None, known.values()):
            judge(result, report)
    command = [sys.executable, str(Path(__file__).with_name("gpu_pytest.py")), str(folder), *more]
    with TemporaryDirectory() as place:
        workers = [
            Worker(f"{place}/{i}", tests, command, report)
            for i, tests in enumerate(deal(waiting, count))
        ]
        busy = workers
        while busy and report.seconds_left > RESERVE:
            busy = [worker for worker in busy if worker.poll(hangs)]
            time.sleep(POLL)
        for worker in workers:
            worker.stop()
            for test in worker.todo:
                report.leave_out(test)


def main() -> int:
    args, _, report = parse(__doc__ or "")
    os.chdir(ROOT)
    cores = os.cpu_count() or 1
    count = min(2, cores) if args.rehearse else max(1, min(PROCESSES, cores // 2))
    os.environ["OMP_NUM_THREADS"] = str(max(1, cores // count))
    run(
        ROOT / "tests" / "gpu",
        report,
        chosen=os.environ.get("TESTS", ""),
        count=count,
        hangs=HANGS * (10 if args.rehearse else 1),
        more=[] if args.rehearse else ["--memory", str(MEMORY / count)],
    )
    report.write()
    say(f"{len(report.content['results'])} tests in {count} processes")
    return report.status


if __name__ == "__main__":
    sys.exit(main())
