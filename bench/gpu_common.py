"""What the parts of `bench/gpu.py` share: the checkout's packages, the clock, the results file."""

from __future__ import annotations

import argparse
import json
import logging
import platform
import sys
import threading
import time
import traceback
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of
from pathlib import Path
from statistics import median
from typing import Any

import gpu_files
from checkout import load_checkout
from gpu_files import ROOT

CLOCKS_EVERY = 10  # seconds
OF_CASES = ("results", "slow", "compiled_while_timed")  # lists of what was found, by "case_name"


load_checkout()

import torch  # noqa: E402 - the checkout's packages come first

from multilora.device.cpu import Device  # noqa: E402
from multilora.device.select import open_device  # noqa: E402
from multilora.errors import ConfigError  # noqa: E402


class Report:
    """The results of one part, written after each case.

    If the file holds results of the same state (see `gpu_files.state`) that were cut short,
    `knows_case` and `known` give them one by one, so that only what was left out is measured.
    """

    def __init__(self, path: Path, device: Device, seconds: float, state: dict[str, str]) -> None:
        self._path, self._end = path, time.monotonic() + seconds
        self.case = ""  # that is being done, for a later run to know it by
        before = gpu_files.read(path)
        if before.get("state") != state or before.get("complete"):
            before = {}
        earlier = before.get("earlier", {})
        self._earlier: dict[str, list[dict[str, Any]]] = {
            kind: earlier.get(kind, []) + before.get(kind, []) for kind in OF_CASES
        }
        self.content: dict[str, Any] = {
            "state": state,
            "machine": machine(device),
            **{kind: [] for kind in OF_CASES},
            "left_out": 0,
            "left_out_cases": [],
            "done_cases": before.get("done_cases", []),
            "compiled": before.get("compiled", 0),
            # [seconds since 1970, what the driver says]; "at" of a result likewise
            "clocks": before.get("clocks", []),
            "log": before.get("log", []),  # likewise, what engines say of their memory and graphs
            "earlier": self._earlier,  # of the runs before this one, not asked for yet
        }
        if clocks():
            threading.Thread(target=self._watch_clocks, daemon=True).start()
        self.write()

    @property
    def seconds_left(self) -> float:
        """Until this part should end."""
        return self._end - time.monotonic()

    def known(self, **fields: Any) -> dict[str, Any] | None:
        """An earlier run's result with these fields, which is then one of this run's, too."""
        wanted = json.loads(json.dumps(fields, default=str))
        for i, result in enumerate(self._earlier["results"]):
            if all(name in result and result[name] == wanted[name] for name in wanted):
                self.content["results"].append(self._earlier["results"].pop(i))
                return result
        return None

    def knows_case(self, name: str) -> bool:
        """Whether an earlier run has done a case to its end; what it found is then ours.

        What it found of a case that it did not end is dropped: that is done again.
        """
        is_done, count = name in self.content["done_cases"], 0
        for kind, entries in self._earlier.items():
            found = [entry for entry in entries if entry.get("case_name") == name]
            entries[:] = [entry for entry in entries if entry.get("case_name") != name]
            if is_done:
                self.content[kind] += found
                count += len(found) if kind == "results" else 0
        return count > 0  # a case of no results of its own, as a group of cases, is done again

    def done(self, name: str) -> None:
        """Notes that a case has all its results."""
        if name not in self.content["done_cases"]:
            self.content["done_cases"].append(name)
        self.write()

    def add(self, **result: Any) -> None:
        """Adds a result."""
        named = {"case_name": self.case} if self.case else {}
        self.content["results"].append({**result, **named, "at": round(time.time())})
        self.write()

    def fail(self, why: str) -> None:
        """Notes a case that went wrong; the others go on."""
        self.content.setdefault("failures", []).append(why)
        say(why)
        self.write()

    def crash(self, kind: type[BaseException], error: BaseException, trace: Any) -> None:
        """Notes what ended the part: for `sys.excepthook`."""
        self.content["crashed"] = "".join(traceback.format_exception(kind, error, trace))
        self.fail(f"the part ended by {kind.__name__}: {error}")
        sys.__excepthook__(kind, error, trace)

    @property
    def num_failures(self) -> int:
        """How many cases went wrong."""
        return len(self.content.get("failures", []))

    @property
    def status(self) -> int:
        """The exit status of the part."""
        return 1 if self.num_failures else 0

    def leave_out(self, what: Any) -> None:
        """Notes a case for which there was no time."""
        self.content["left_out"] += 1
        self.content["left_out_cases"].append(str(what))

    def write(self) -> None:
        """Writes the file, whole or not at all."""
        gpu_files.write(self._path, self.content)

    def _watch_clocks(self) -> None:
        while True:
            self.content["clocks"].append([round(time.time()), clocks()])
            time.sleep(CLOCKS_EVERY)


def parse(description: str) -> tuple[argparse.Namespace, Device, Report]:
    """The arguments of a part, its device and its report."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes, without a GPU")
    args = parser.parse_args()
    if args.rehearse:
        import pytest

        from tests.harness import gpu_rehearsal

        gpu_rehearsal.install(pytest.MonkeyPatch())  # for the life of this process
    try:
        device = open_device("cuda")
    except ConfigError as error:
        say(f"no GPU: {error}")
        raise SystemExit(2) from error
    state = gpu_files.state(rehearse=args.rehearse)
    report = Report(args.out, device, args.seconds, state)
    sys.excepthook = report.crash
    logger = logging.getLogger("multilora")
    logger.setLevel(logging.INFO)
    logger.addHandler(Log(report.content["log"]))
    return args, device, report


class Log(logging.Handler):
    """Keeps what the library logs, in a list of [seconds since 1970, text]."""

    def __init__(self, lines: list[Any]) -> None:
        super().__init__(logging.INFO)
        self._lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        """Adds a line."""
        self._lines.append([round(record.created), record.getMessage()])


class Clock:
    """Times work by the device's own events."""

    def __init__(self, device: Device) -> None:
        self._device = device

    def seconds(self, work: Callable[[], Any]) -> float:
        """Of one call."""
        start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start_event.record()
        work()
        end_event.record()
        end_event.synchronize()
        return float(start_event.elapsed_time(end_event)) / 1e3

    def of_graph(
        self, steps: list[Callable[[], torch.Tensor]], repeat: int
    ) -> tuple[float, float, float]:
        """Median, 10th and 90th percentile of the seconds of one step of a captured chain.

        The steps use different weights, so that each finds its own cold.
        """

        def chain() -> torch.Tensor:
            for step in steps:
                last = step()
            return last

        graph = self._device.capture(chain)
        graph.replay()
        times = sorted(self.seconds(graph.replay) / len(steps) for _ in range(repeat))
        return median(times), times[len(times) // 10], times[-1 - len(times) // 10]


def copy_bandwidth(device: Device, num_bytes: int) -> float:
    """Bytes per second, read and written, of a large copy."""
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=device.torch)
    target = torch.empty_like(source)
    clock = Clock(device)
    return 2 * num_bytes / min(clock.seconds(lambda: target.copy_(source)) for _ in range(10))


def machine(device: Device) -> dict[str, Any]:
    """What the numbers were measured on, and with."""
    properties = torch.cuda.get_device_properties(device.torch)
    return {
        "device": device.name,
        "capability": torch.cuda.get_device_capability(device.torch),
        "memory": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "system": platform.platform(),
        "commit": commit(),
        "versions": {name: version(name) for name in ("torch", "triton", "transformers", "peft")},
    }


def commit() -> str:
    """The checkout's commit, or "unknown" where there is no git or no repository."""
    found = gpu_files.first_line("git", "-C", str(ROOT), "describe", "--always", "--dirty")
    return found or "unknown"


def clocks() -> str:
    """What the driver says of clocks, power and temperature; empty without one."""
    return gpu_files.ask_driver(
        "clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "temperature.gpu"
    )


def version(name: str) -> str:
    """A package's version."""
    try:
        return version_of(name)
    except PackageNotFoundError:
        return "not installed"


def say(*values: object) -> None:
    """Prints at once, for a log that is read while the part runs."""
    print(*values, file=sys.stdout, flush=True)
