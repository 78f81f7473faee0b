"""How the parts of `bench/gpu.py` time work: on cold caches, with nothing compiled meanwhile."""

from __future__ import annotations

import argparse
import math
import os
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from gpu_common import Clock, Report, copy_bandwidth
from gpu_limits import STAND_IN, Judge, card_of
from gpu_model import Card

from multilora.device.cpu import Device

EVICT = 4  # times as many bytes as the L2 cache holds are read before a chain runs
USUAL_L2 = 64 << 20  # bytes, where torch does not tell
MAX_SETS = 32  # of weights in a chain: enough for the start of a replay not to count


def l2_bytes(device: Device) -> int:
    """Of the device's L2 cache."""
    properties = torch.cuda.get_device_properties(device.torch)
    return getattr(properties, "L2_cache_size", 0) or USUAL_L2


@dataclass(frozen=True)
class Timed:
    """Steps, and how long the host waited for the device in them."""

    seconds: tuple[float, ...]  # of each
    waited: float

    @property
    def host_us(self) -> float:
        """What a step takes of the host."""
        return 1e6 * (sum(self.seconds) - self.waited) / len(self.seconds)


@dataclass
class Waits:
    """Time spent in waits for the device, in seconds."""

    seconds: float = 0.0


@contextmanager
def waiting() -> Iterator[Waits]:
    """Counts waits for events: no step waits for anything else."""
    found, event = Waits(), torch.cuda.Event
    wait = event.synchronize

    def synchronize(self: Any) -> None:
        start = time.perf_counter()
        wait(self)
        found.seconds += time.perf_counter() - start

    event.synchronize = synchronize  # type: ignore[method-assign]
    try:
        yield found
    finally:
        event.synchronize = wait  # type: ignore[method-assign]


def sets_of(num_bytes: int, cold: int) -> int:
    """How many sets of weights of so many bytes make a chain: `cold` bytes, or MAX_SETS."""
    return max(2, min(MAX_SETS, math.ceil(cold / num_bytes)))


class Watch:
    """Knows when Triton compiles, and keeps the timed regions in which it did: they are spoiled.

    Nothing is compiled in a rehearsal. There a launch counts that would be: `launch_keys`.
    """

    def __init__(self, while_timed: list[dict[str, str]] | None = None) -> None:
        self.compiled: list[str] = []  # the kernels, in order
        self.while_timed = [] if while_timed is None else while_timed
        self.case_name = ""  # that is being measured, for a later run to know its lines by

    def install(self) -> None:
        """From now on every variant of a kernel is noticed, in this process."""
        if os.environ.get("TRITON_INTERPRET") == "1":
            from tests.harness import launch_keys

            launch_keys.on_new_key(self.compiled.append)
            return
        from triton import knobs

        before = knobs.runtime.jit_post_compile_hook

        def compiled(*args: Any, **rest: Any) -> Any:
            self.compiled.append(rest["fn"].name)
            return before(*args, **rest) if before is not None else None

        knobs.runtime.jit_post_compile_hook = compiled

    @contextmanager
    def timed(self, what: object) -> Iterator[None]:
        """A region in which the clock runs."""
        before = len(self.compiled)
        yield
        found = self.compiled[before:]
        named = {"case_name": self.case_name} if self.case_name else {}
        self.while_timed += [{"timed": str(what), "kernel": name, **named} for name in found]


class ColdClock(Clock):
    """A clock whose chains find none of their weights in a cache."""

    def __init__(self, device: Device, watch: Watch) -> None:
        super().__init__(device)
        self.case: object = None  # what is timed, for `Watch`
        self._watch = watch
        count = EVICT * l2_bytes(device) // 4
        self._filler = torch.zeros(count, dtype=torch.float32, device=device.torch)

    def seconds(self, work: Callable[[], Any]) -> float:
        """Of one call."""
        with self._watch.timed(self.case):
            return super().seconds(work)

    def evict(self) -> None:
        """Fills the L2 cache by reading: what was written would be written back while we time."""
        self._filler.sum()

    def of_graph(
        self, steps: list[Callable[[], torch.Tensor]], repeat: int
    ) -> tuple[float, float, float]:
        """Median, 10th and 90th percentile of the seconds of one step of a captured chain.

        Each step has weights of its own, is in the chain once, and the cache is full of something
        else when the chain begins: so few steps will do, however little each of them reads.
        """

        def chain() -> torch.Tensor:
            for step in steps:
                last = step()
            return last

        graph = self._device.capture(chain)
        graph.replay()
        times = []
        for _ in range(repeat):
            self.evict()  # the host is through with the launch before the GPU is with this
            times.append(self.seconds(graph.replay) / len(steps))
        times.sort()
        return median(times), times[len(times) // 10], times[-1 - len(times) // 10]


@dataclass(frozen=True)
class Bench:
    """What all cases of a part share."""

    device: Device
    report: Report
    clock: ColdClock
    watch: Watch
    judge: Judge
    copy: float  # bytes per second, read and written
    card: Card  # what predictions are for
    rehearsed: bool = False  # without a GPU: the clock limits nothing

    def run(self, case: object, work: Callable[[], None]) -> None:
        """Does a case, unless an earlier run has; what goes wrong costs the other cases nothing."""
        report, name = self.report, str(case)
        report.case = self.judge.case_name = self.watch.case_name = name
        if report.knows_case(name):
            return
        failures = report.num_failures
        try:
            work()
        except Exception:
            report.fail(f"{case}: {traceback.format_exc()}")
        if report.num_failures == failures:
            report.done(name)

    def close(self, text: str) -> str:
        """Writes the report for the last time; the part's last line."""
        content = self.report.content
        content["compiled"] += len(self.watch.compiled)
        self.report.write()
        spoiled = [f"{entry['timed']}: {entry['kernel']}" for entry in self.watch.while_timed[:5]]
        told = f"; compiled while timed: {', '.join(spoiled)}" if spoiled else ""
        return f"{text}; {self.judge.closing()}{told}"


def open_bench(args: argparse.Namespace, device: Device, report: Report) -> Bench:
    """Measures the copy bandwidth, and watches the compiler from now on."""
    watch = Watch(report.content["compiled_while_timed"])
    watch.install()
    copy = copy_bandwidth(device, 1 << (20 if args.rehearse else 30))
    card = STAND_IN if args.rehearse else card_of(device.name, copy)
    report.content["copy_gigabytes_per_second"] = round(copy / 1e9, 1)
    report.content["card"] = asdict(card)
    judge = Judge(report.content, compares=not args.rehearse)
    return Bench(device, report, ColdClock(device, watch), watch, judge, copy, card, args.rehearse)
