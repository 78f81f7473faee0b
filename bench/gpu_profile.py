"""Part "profile" of `bench/gpu.py`: where the time of a step goes, kernel by kernel.

Decode steps at batch 1, 32 and 256, of the base, of one adapter and of as many as rows; sampled
ones; prompts of 8k tokens. Each is timed without a profiler and then traced: what every kernel
takes, the bytes that it must move, the rate that makes, the gaps in which the GPU waits, the host's
time; beside them what `gpu_model` says. Before that, attention beside torch's own.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import gpu_model
import gpu_trace
import torch
from gpu_attention import Attention, attend
from gpu_common import parse, say
from gpu_limits import KERNEL, STEP
from gpu_session import SAMPLED, Session, Size, release, tiny_model
from gpu_timing import Bench, open_bench


@dataclass(frozen=True)
class Plan:
    """The cases."""

    size: Size
    traced: int  # steps under the profiler
    decodes: tuple[tuple[int, int, bool], ...]  # batch, adapters in it, whether rows are sampled
    prefills: tuple[int, ...]  # adapters
    attentions: tuple[Attention, ...]
    repeat: int  # replays of attention


FULL = Plan(
    Size(
        model="llama-3.1-8b",
        dtype="bfloat16",
        rank=16,
        adapters=256,
        context=1024,
        steps=24,
        prefill=8192,
        prompts=1,
        chunk=8192,
        batch=256,
    ),
    traced=8,
    decodes=(
        *((32, 0, False), (1, 0, False), (256, 0, False), (1, 1, False), (32, 32, False)),
        *((32, 1, False), (64, 0, True), (256, 256, False), (256, 1, False), (256, 0, True)),
    ),
    prefills=(0, 1),
    attentions=(Attention(32, 4096, 1), Attention(1, 8192, 1), Attention(1, 8192, 8192)),
    repeat=20,
)
TINY = Plan(
    Size(
        model="",  # a checkpoint that is written for it
        dtype="bfloat16",
        rank=8,
        adapters=4,
        context=20,
        steps=2,
        prefill=32,
        prompts=1,
        chunk=32,
        batch=4,
    ),
    traced=2,
    decodes=((4, 0, False), (4, 4, False), (4, 1, False), (4, 0, True)),
    prefills=(0, 1),
    attentions=(Attention(2, 32, 1, 4, 2, 16), Attention(1, 32, 32, 4, 2, 16)),
    repeat=2,
)


def traced(work: Callable[[], Any], bench: Bench) -> dict[str, Any]:
    """The trace of some work, all of it and nothing else."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if not bench.rehearsed:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    bench.device.synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        work()
        bench.device.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        found: dict[str, Any] = json.loads(path.read_text())
    return found


class Profile:
    """The cases of one engine."""

    def __init__(self, plan: Plan, bench: Bench) -> None:
        self._plan, self._bench = plan, bench
        self._session = Session(plan.size, bench, plan.size.adapters)

    def decode(self, batch: int, adapters: int, sampled: bool) -> None:
        """Steps of a batch: timed, then traced."""
        plan, session = self._plan, self._session
        params = SAMPLED if sampled else {}
        session.fill(batch, adapters, plan.size.steps + plan.traced, **params)
        name = f"decode, batch {batch}, {adapters} adapters{', sampled' if sampled else ''}"
        timed = session.timed(plan.size.steps, name)

        def steps() -> None:
            for _ in range(plan.traced):
                session.engine.step()

        trace = traced(steps, self._bench)
        session.abort_all()
        step = session.decode_step(batch, adapters, batch if sampled else 0)
        case = {"case": "decode", "batch": batch, "adapters": adapters, "sampled": sampled}
        wall = 1e6 * median(timed.seconds)
        self._explain(name, case, trace, [step] * plan.traced, wall, timed.host_us)

    def prefill(self, adapters: int) -> None:
        """Prompts: computed once, timed, then traced."""
        session, tokens = self._session, self._plan.size.prefill
        timed = session.prefill(adapters)
        session.queue_prompts(adapters)
        trace = traced(session.run_out, self._bench)
        steps = session.prefill_steps(adapters)
        case = {"case": "prefill", "tokens": tokens, "adapters": adapters}
        name = f"prefill, {tokens} tokens, {adapters} adapters"
        wall = 1e6 * sum(timed.seconds) / len(steps)
        self._explain(name, case, trace, steps, wall, timed.host_us / len(steps))

    def _explain(
        self,
        name: str,
        case: dict[str, Any],
        trace: dict[str, Any],
        steps: Sequence[gpu_model.Step],  # that were traced
        wall_us: float,  # of one
        host_us: float,
    ) -> None:
        """Writes and prints a case: the step, then its kernels."""
        bench, session, count = self._bench, self._session, len(steps)
        model = [gpu_model.predict(session.shape, step, bench.card) for step in steps]
        predicted = sum(p.us for p in model) / count
        found = gpu_trace.launches(trace)
        rows = gpu_trace.rows_of(found, session.shape.layers)
        wanted = gpu_trace.expected([p.kernels for p in model], bench.card)
        kernels = gpu_trace.table(rows, wanted, count, bench.copy)
        for entry in kernels:
            if "predicted_us" in entry:
                label = f"{name}: {entry['kernel']}"
                entry |= bench.judge.beside(label, entry["us"], entry["predicted_us"], limit=KERNEL)
        result = {
            "wall_us": round(wall_us, 1),
            "host_us": round(host_us, 1),
            "host_launches": round(gpu_trace.host_launches(trace) / count, 2),
            **gpu_trace.summary(found, count),
            "rest_us": round(sum(e["us"] for e in kernels if e["kernel"] == gpu_trace.REST), 2),
            "predicted_rest_us": round(wanted[gpu_trace.REST].us / count, 2),
            "predicted_gpu_us": round(sum(p.gpu_us for p in model) / count, 1),
            "predicted_host_us": round(sum(p.host_us for p in model) / count, 1),
            "predicted_launches": sum(p.launches for p in model) / count,
            **bench.judge.beside(name, wall_us, predicted, limit=STEP),
        }
        bench.report.add(kind="step", **case, **result, kernels=kernels)
        say(f"\n{name}: {wall_us / 1e3:.2f} ms a step, model {predicted / 1e3:.2f}")
        shown = ("launches", "sum_of_kernels_us", "gap_us", "median_gap_us", "host_us")
        say("; ".join(f"{key} {result[key]:g}" for key in shown))
        say("\n".join(gpu_trace.lines(kernels)))


def main() -> int:
    args, device, report = parse(__doc__ or "")
    plan = FULL
    if args.rehearse:
        model = tiny_model(args.out.parent / "tiny")
        plan = replace(TINY, size=replace(TINY.size, model=model))
    torch.manual_seed(0)
    bench = open_bench(args, device, report)
    traced(lambda: torch.ones(8, device=device.torch).sum(), bench)  # before anything is captured
    run(plan, bench)
    say(bench.close(f"{len(report.content['results'])} results"))
    return report.status


def run(plan: Plan, bench: Bench) -> None:
    """All cases for which there is time."""
    with torch.inference_mode():
        for case in plan.attentions:
            bench.run(case, partial(attend, case, torch.bfloat16, plan.repeat, bench))
    release(bench.device)
    engines: list[Profile] = []
    bench.run("the engine's start", lambda: engines.append(Profile(plan, bench)))
    for engine in engines:
        work = [partial(engine.decode, *case) for case in plan.decodes]
        prompts = [partial(engine.prefill, adapters) for adapters in plan.prefills]
        for case in (*work[:1], *prompts, *work[1:]):
            if bench.report.seconds_left < 15 and not bench.rehearsed:
                bench.report.leave_out((case.func.__name__, *case.args))
                continue
            bench.run((case.func.__name__, *case.args), case)


if __name__ == "__main__":
    sys.exit(main())
