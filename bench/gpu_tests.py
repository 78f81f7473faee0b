"""Part "tests" of `bench/gpu.py`: tests/gpu on the real device, their outcomes as JSON."""

from __future__ import annotations

import os
import sys

from gpu_common import ROOT, Report, parse


class Outcomes:
    """A pytest plugin that keeps what came of each test."""

    def __init__(self, report: Report) -> None:
        self._report = report

    def pytest_runtest_logreport(self, report: object) -> None:
        when, outcome = getattr(report, "when", ""), getattr(report, "outcome", "")
        if when == "call" or outcome != "passed":
            self._report.add(
                test=getattr(report, "nodeid", ""),
                outcome=outcome,
                seconds=round(getattr(report, "duration", 0.0), 3),
                text=str(getattr(report, "longrepr", "") or "")[-2000:],
            )


def main() -> int:
    _, _, report = parse(__doc__ or "")
    os.chdir(ROOT)
    import pytest

    settings = ["-c", "bench/gpu.ini", "--rootdir", str(ROOT), "-p", "no:cacheprovider"]
    options = [*settings, "-q", "-m", "gpu", "tests/gpu"]
    code = int(pytest.main(options, plugins=[Outcomes(report)]))
    report.content["exit_status"] = code
    report.write()
    return code


if __name__ == "__main__":
    sys.exit(main())
