"""`python -m multilora_kernels.cuda.tune`: times launch parameters on this GPU, rewrites its table.

Every site of Llama 3.1 8B and 70B, with batches of distinct adapters and of one adapter. A score is
the mean logarithm of their seconds: a batch counts by how many times slower it gets, whatever it
takes.

The arithmetic of a shape is chosen first, with the schedules of the present table: all candidates.
With each of the best two, the schedule of every token bucket is then sought by changing one option
at a time. See `launch_plans` for why tokens may not choose the arithmetic. The table is written
after each shape; shapes for which there is no time, or that are not named, keep their entries.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch

from . import launch_plans
from .launch_plans import LaunchPlans
from .tune_timer import Load, Scale, Timer, gpu_timer

logger = logging.getLogger(__name__)

Options = Mapping[str, Sequence[int]]
Schedule = Mapping[str, int]
Job = tuple[str, tuple[int, int]]
"""An op, and in or out and slices."""


class Space(NamedTuple):
    """The candidates of an op: every arithmetic, and schedules out of these options."""

    arithmetic: Options
    decode: Options
    prefill: Options

    def options(self, bucket: str) -> Options:
        """Of the schedules for a bucket."""
        return self.prefill if bucket == launch_plans.ANY else self.decode


SPACES = {
    "lora_shrink": Space(
        {"block_k": [64, 128], "split_k": [2, 4, 8, 16]},
        {
            "block_m": [16],
            "block_pages": [2, 4, 8],
            "column_programs": [1, 2],
            "num_warps": [4],
            "num_stages": [3, 4, 5],
        },
        {
            "block_m": [16, 32],
            "block_pages": [4, 8],
            "column_programs": [1, 2],
            "num_warps": [4],
            "num_stages": [3, 4],
        },
    ),
    "lora_expand": Space(
        {"block_pages": [2]},
        {
            "block_m": [16],
            "block_n": [128, 256],
            "programs_per_sm": [2, 4, 6],
            "num_warps": [4, 8],
            "num_stages": [1],
        },
        {
            "block_m": [32],
            "block_n": [64, 128],
            "programs_per_sm": [2, 3, 4],
            "num_warps": [4, 8],
            "num_stages": [1, 2],
        },
    ),
}
SITES = (
    # in, out, slices: gate_up, qkv, down, o of 8B, then of 70B; the most telling first
    *((4096, 28672, 2), (4096, 6144, 3), (14336, 4096, 1), (4096, 4096, 1)),
    *((8192, 57344, 2), (8192, 10240, 3), (28672, 8192, 1), (8192, 8192, 1)),
)
FINALISTS = 2  # arithmetics whose schedules are sought
MARGIN = 0.02  # of the seconds: what less than that wins is noise, and changes nothing
SECONDS = 0.1  # that a candidate takes, most of it to compile; an estimate, not measured yet


class OutOfTime(Exception):
    """The time for tuning is over."""


class Found(NamedTuple):
    """What came of one shape."""

    entry: dict[str, Any]  # of the table
    gain: float  # times faster than with the present entry
    timings: int


class Tuned(NamedTuple):
    """A table after one more shape."""

    job: Job
    table: LaunchPlans
    found: Found


def all_jobs() -> list[Job]:
    """Every shape in the order of what it teaches; an expand after each shrink that feeds it."""
    jobs: list[Job] = []
    for in_, out, slices in SITES:
        jobs += [("lora_shrink", (in_, slices)), ("lora_expand", (out, slices))]
    return [job for i, job in enumerate(jobs) if job not in jobs[i + 1 :]]


def name_of(job: Job) -> str:
    return f"{job[0]} {launch_plans.name_of(job[1])}"


def planes_of(job: Job, table: LaunchPlans) -> list[int]:
    """The numbers of planes that an expand may have to sum: those of the shrinks before it."""
    width, slices = job[1]
    before = [in_ for in_, out, count in SITES if (out, count) == (width, slices)]
    found = set()
    for in_ in before or [width]:  # a shape of the user's own: as if its site were square
        arithmetic = table.entry("lora_shrink", (in_, slices))["arithmetic"]
        found.add(min(arithmetic["split_k"], -(-in_ // arithmetic["block_k"])))
    return sorted(found)


def loads_of(job: Job, table: LaunchPlans, scale: Scale) -> dict[str, list[Load]]:
    """The batches to time, by bucket."""
    planes = planes_of(job, table) if job[0] == "lora_expand" else [1]
    return {bucket: scale.loads(bucket, planes) for bucket in scale.names()}


def candidates(options: Options) -> Iterator[dict[str, int]]:
    for values in itertools.product(*options.values()):
        yield dict(zip(options, values, strict=True))


def one_family(schedule: Schedule) -> bool:
    """Whether tiles of this schedule keep to mma.sync, as `lora` promises: see its docstring."""
    return schedule["block_m"] < 64 or schedule["num_warps"] < 4


def count(job: Job, table: LaunchPlans, scale: Scale) -> int:
    """About how many timings a shape takes: those of a search that changes its mind nowhere."""
    space = SPACES[job[0]]
    every, found = len(list(candidates(space.arithmetic))), 0
    for bucket, loads in loads_of(job, table, scale).items():
        changes = 1 + sum(len(values) - 1 for values in space.options(bucket).values())
        found += len(loads) * (every + min(FINALISTS, every) * changes)
    return found


def forecast(jobs: Sequence[Job], table: LaunchPlans, scale: Scale) -> str:
    """A line that says what is to be done."""
    timings = sum(count(job, table, scale) for job in jobs)
    minutes = timings * SECONDS / 60
    return f"{len(jobs)} shapes, about {timings} candidates and {minutes:.1f} minutes"


def descend(
    options: Options, start: Schedule, score: Callable[[Schedule], float]
) -> tuple[float, Schedule]:
    """The best score and schedule that changes of one option at a time lead to."""
    best, least, improved = dict(start), score(start), True
    while improved:
        improved = False
        for name, values in options.items():
            for value in values:
                changed = {**best, name: value}
                if not one_family(changed):
                    continue
                found = score(changed)
                if found < least - MARGIN:
                    best, least, improved = changed, found, True
    return least, best


class Search:
    """The search for one shape's entry: every timing is taken once."""

    def __init__(self, job: Job, table: LaunchPlans, timer: Timer, scale: Scale) -> None:
        op, shape = job
        self.space, self.present = SPACES[op], table.entry(op, shape)
        self.loads = loads_of(job, table, scale)
        schedule = self.present["schedule"]
        self.usual = {
            bucket: schedule[launch_plans.bucket_of(loads[0].tokens, schedule)]
            for bucket, loads in self.loads.items()
        }
        self.known: dict[Any, float] = {}
        self._time = partial(timer, op, shape)

    def score(self, bucket: str, arithmetic: Schedule, schedule: Schedule) -> float:
        """The mean logarithm of the seconds over the batches of a bucket."""
        plan, logs = {**arithmetic, **schedule}, []
        for load in self.loads[bucket]:
            key = load, frozenset(plan.items())
            if key not in self.known:
                self.known[key] = math.log(self._time(load, plan))
            logs.append(self.known[key])
        return fmean(logs)

    def first_score(self, arithmetic: Schedule) -> float:
        """Over all buckets, with the schedules of the present table."""
        return fmean(self.score(bucket, arithmetic, self.usual[bucket]) for bucket in self.usual)

    def finalists(self) -> list[Schedule]:
        """The arithmetics that are worth a search of schedules, the present one first."""
        present = self.present["arithmetic"]
        others = [a for a in candidates(self.space.arithmetic) if a != present]
        # Of those that are as good, the one that changes least.
        others.sort(key=lambda a: sum(a[name] != present[name] for name in a))
        every = [present, *others]
        ranked = sorted(every, key=lambda a: self.first_score(a) - (a == present) * MARGIN)
        ranked = ranked[:FINALISTS]
        if self.first_score(ranked[0]) == math.inf:  # the present schedules tell nothing
            return every
        return [arithmetic for arithmetic in every if arithmetic in ranked]

    def entry(self, arithmetic: Schedule) -> tuple[float, dict[str, Any]]:
        """The best score and table entry with this arithmetic."""
        scores, schedules = [], {}
        for bucket, usual in self.usual.items():
            score = partial(self.score, bucket, arithmetic)
            found, schedule = descend(self.space.options(bucket), usual, score)
            scores.append(found)
            schedules[bucket] = dict(schedule)
        return fmean(scores), {"arithmetic": dict(arithmetic), "schedule": schedules}


def tune(job: Job, table: LaunchPlans, timer: Timer, scale: Scale) -> Found:
    """The best table entry of one op and shape; RuntimeError if no candidate can be launched."""
    search, best, least = Search(job, table, timer, scale), None, math.inf
    for arithmetic in search.finalists():
        score, entry = search.entry(arithmetic)
        if score < least - MARGIN:
            best, least = entry, score
    if best is None:
        raise RuntimeError(f"no candidate of {name_of(job)} can be launched")
    before = search.first_score(search.present["arithmetic"])
    return Found(best, math.exp(before - least), len(search.known))


def with_entry(table: LaunchPlans, job: Job, entry: Mapping[str, Any]) -> LaunchPlans:
    """A table with another entry for one op and shape."""
    op, shape = job
    return LaunchPlans({**table.ops, op: {**table.ops[op], launch_plans.name_of(shape): entry}})


def retune(table: LaunchPlans, jobs: Sequence[Job], timer: Timer, scale: Scale) -> Iterator[Tuned]:
    """The table after each shape, with the entries of all before it, until OutOfTime."""
    for job in jobs:
        try:
            found = tune(job, table, timer, scale)
        except OutOfTime:
            return
        table = with_entry(table, job, found.entry)
        yield Tuned(job, table, found)


def until(end: float, timer: Timer) -> Timer:
    """A timer that raises OutOfTime from `end` on, in seconds of the monotonic clock."""

    def limited(
        op: str, shape: tuple[int, int], load: Load, plan: launch_plans.LaunchPlan
    ) -> float:
        if time.monotonic() >= end:
            raise OutOfTime
        return timer(op, shape, load, plan)

    return limited


def write(table: LaunchPlans, path: Path) -> None:
    """Writes a table, whole or not at all."""
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps(table.ops, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def chosen_jobs(ops: Sequence[str] | None, shapes: Sequence[str] | None) -> list[Job]:
    """The jobs of the command line; ValueError for a shape that is not WIDTHxSLICES."""
    if not shapes:
        return [job for job in all_jobs() if job[0] in (ops or SPACES)]
    own = [(int(width), int(slices)) for width, _, slices in (s.partition("x") for s in shapes)]
    return [(op, shape) for op in ops or SPACES for shape in own]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="multilora_kernels.cuda.tune", description=__doc__)
    parser.add_argument("--op", choices=SPACES, action="append", help="default: all")
    parser.add_argument(
        "--shape", action="append", help="width x slices, e.g. 4096x3; default: Llama 3.1's"
    )
    parser.add_argument("--output", type=Path, help="default: the table of this GPU")
    parser.add_argument("--seconds", type=float, default=math.inf, help="default: no limit")
    chosen = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("no CUDA device: a table is tuned where it is used")
    where = torch.device("cuda", torch.cuda.current_device())
    device, scale = launch_plans.target_of(where), Scale()
    jobs = chosen_jobs(chosen.op, chosen.shape)
    logger.info(forecast(jobs, device.plans, scale))
    timer = until(time.monotonic() + chosen.seconds, gpu_timer(where, scale))
    for tuned in retune(device.plans, jobs, timer, scale):
        write(tuned.table, chosen.output or launch_plans.path_of(device.sm))
        logger.info("%s: %.2f times as fast", name_of(tuned.job), tuned.found.gain)
        jobs = jobs[1:]
    if jobs:
        left = ", ".join(map(name_of, jobs))
        logger.info("no time was left for %s: their entries are as they were", left)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main()
