"""What the parts of `bench/gpu.py` share: the checkout's packages, the clock, the results file."""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def load_checkout() -> None:
    """Makes `multilora`, `multilora_kernels` and `tests` importable from a bare checkout."""
    spec = importlib.util.spec_from_file_location("checkout", ROOT / "tests" / "checkout.py")
    assert spec is not None
    assert spec.loader is not None
    checkout = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(checkout)
    checkout.load_packages("multilora_kernels", "multilora", "tests")


load_checkout()

import torch  # noqa: E402 - the checkout's packages come first

from multilora.device.cpu import Device  # noqa: E402
from multilora.device.select import open_device  # noqa: E402


class Report:
    """The results of one part, written after each case."""

    def __init__(self, path: Path, device: Device, seconds: float) -> None:
        self._path, self._end = path, time.monotonic() + seconds
        self.content: dict[str, Any] = {"machine": machine(device), "results": [], "left_out": 0}
        self.write()

    @property
    def seconds_left(self) -> float:
        """Until this part should end."""
        return self._end - time.monotonic()

    def add(self, **result: Any) -> None:
        """Adds a case."""
        self.content["results"].append(result)
        self.write()

    def fail(self, why: str) -> None:
        """Notes a case that went wrong; the others go on."""
        self.content.setdefault("failures", []).append(why)
        say(why)
        self.write()

    @property
    def status(self) -> int:
        """The exit status of the part."""
        return 1 if "failures" in self.content else 0

    def leave_out(self, what: Any) -> None:
        """Notes a case for which there was no time."""
        self.content["left_out"] += 1
        self.content.setdefault("left_out_first", what)

    def write(self) -> None:
        """Writes the file, whole or not at all."""
        self.content["clocks_now"] = clocks()
        part = self._path.with_suffix(".part")
        part.write_text(json.dumps(self.content, indent=1, default=str))
        part.replace(self._path)


def parse(description: str) -> tuple[argparse.Namespace, Device, Report]:
    """The arguments of a part, its device and its report."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes, without a GPU")
    args = parser.parse_args()
    if args.rehearse:
        import pytest

        from tests import rehearsal

        rehearsal.install(pytest.MonkeyPatch())  # for the life of this process
    device = open_device("cuda")
    return args, device, Report(args.out, device, args.seconds)


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
        "clocks": clocks(),
    }


def commit() -> str:
    """The checkout's commit, or "unknown" where there is no git or no repository."""
    return _first_line(["git", "-C", str(ROOT), "describe", "--always", "--dirty"]) or "unknown"


def clocks() -> str:
    """What the driver says of clocks, power and temperature; empty without one."""
    query = "clocks.sm,clocks.mem,clocks.max.sm,power.draw,temperature.gpu"
    return _first_line(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"])


def version(name: str) -> str:
    """A package's version."""
    try:
        return version_of(name)
    except PackageNotFoundError:
        return "not installed"


def _first_line(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip().partition("\n")[0] if done.returncode == 0 else ""


def say(*values: object) -> None:
    """Prints at once, for a log that is read while the part runs."""
    print(*values, file=sys.stdout, flush=True)
