"""One process of part "tests" of `bench/gpu.py`: pytest over the tests that it is given.

What comes of each is a line of JSON, written at once: {"begin": test} before it, {"test": test,
"outcome": ..., "seconds": ..., "text": ...} after it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from gpu_common import ROOT, load_checkout, torch

SPOILED = 86  # the exit status of a process whose GPU context is no longer usable


class Plugin:
    """Keeps to the given tests, in their order, and writes what comes of them."""

    def __init__(self, tests: list[str], events: Path) -> None:
        self._tests, self._events = tests, events
        self._reports: list[Any] = []  # of the test that runs: set-up, call, tear-down

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        found = {item.nodeid: item for item in items}
        items[:] = [found[test] for test in self._tests]

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._reports = []
        self._write({"begin": nodeid})

    def pytest_runtest_logreport(self, report: Any) -> None:
        self._reports.append(report)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        bad = [report for report in self._reports if report.outcome != "passed"]
        event = {
            "test": nodeid,
            "outcome": bad[0].outcome if bad else "passed",
            "seconds": round(sum(report.duration for report in self._reports), 3),
        }
        if bad:
            event["text"] = str(bad[0].longrepr)[-2000:]
        self._write(event)
        if event["outcome"] == "failed" and not usable():
            os._exit(SPOILED)

    def _write(self, event: dict[str, Any]) -> None:
        with self._events.open("a") as file:
            file.write(json.dumps(event) + "\n")


def usable() -> bool:
    """Whether the GPU still works for this process: after an illegal access nothing does."""
    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def options_of(folder: Path) -> list[str]:
    """pytest's arguments for the GPU tests in a folder."""
    settings = ["-c", str(ROOT / "bench" / "gpu.ini"), "--rootdir", str(ROOT)]
    return [*settings, "-p", "no:cacheprovider", "-q", "-m", "gpu", str(folder)]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tests", type=Path, required=True, help="JSON: a list of tests")
    parser.add_argument("--events", type=Path, required=True)
    parser.add_argument("--memory", type=float, help="the fraction of the GPU's that it may take")
    args = parser.parse_args()
    load_checkout()
    os.chdir(ROOT)
    import pytest

    if args.memory is not None:
        torch.cuda.set_per_process_memory_fraction(args.memory)
    plugin = Plugin(json.loads(args.tests.read_text()), args.events)
    return int(pytest.main(options_of(args.folder), plugins=[plugin]))


if __name__ == "__main__":
    sys.exit(main())
