"""Part "tune" of `bench/gpu.py`: the launch parameters of the LoRA kernels, measured anew.

Writes the table of this GPU beside the results after every shape, never into the checkout: to take
it, copy it into kernels/cuda/launch_plans.
"""

from __future__ import annotations

import sys
import time
from contextlib import nullcontext

from gpu_common import parse, say, torch

from multilora_kernels.cuda import launch_plans, tune
from multilora_kernels.cuda.tune_timer import Scale, gpu_timer

TINY = Scale(buckets=(4,), prefill=64, rank=8, copies=2, evicted=1 << 10, repeat=1)
TINY_JOBS: list[tune.Job] = [("lora_shrink", (64, 2)), ("lora_expand", (64, 1))]


def without_graphs() -> None:
    """For a rehearsal: its graphs can keep torch's operators, not bare launches of kernels."""
    torch.cuda.graph = lambda graph: nullcontext()
    torch.cuda.CUDAGraph.replay = lambda graph: None


def main() -> int:
    args, device, report = parse(__doc__ or "")
    if args.rehearse:
        without_graphs()
    here, scale = launch_plans.target_of(device.torch), TINY if args.rehearse else Scale()
    table, jobs = here.plans, []
    for job in TINY_JOBS if args.rehearse else tune.all_jobs():
        known = report.known(shape=tune.name_of(job))
        if known is None:
            jobs.append(job)
        else:
            table = tune.with_entry(table, job, known["entry"])
    say(tune.forecast(jobs, table, scale))
    path = args.out.parent / launch_plans.path_of(here.sm).name
    timer = tune.until(time.monotonic() + report.seconds_left, gpu_timer(device.torch, scale))
    for tuned in tune.retune(table, jobs, timer, scale):
        tune.write(tuned.table, path)
        found, name = tuned.found._asdict(), tune.name_of(tuned.job)
        report.add(shape=name, before=table.entry(*tuned.job), **found)
        say(f"{name}: {tuned.found.gain:.2f} times as fast")
        jobs = jobs[1:]
    for job in jobs:
        report.leave_out(tune.name_of(job))
    report.write()
    return report.status


if __name__ == "__main__":
    sys.exit(main())
