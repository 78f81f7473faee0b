"""Where the time of one decode step goes, part by part, and how far each part is from its floor.

    python bench/bench_step.py --work 1b --precision bf16 --requests 1,8,16

Llama 3.2 1B's shape with random weights, every request with an adapter of its own. Steps are
captured; the kernels are timed one by one in C++ when they are made again, the rest is what a step
takes besides. A part's floor is
`max(flops / peak, bytes / bandwidth)` with the rates that floor.py measures, the better of before
and after, since they change from minute to minute. The peak is that of FMA for fp32; activations of
16 bits, which all other precisions have, may meet the machine's bf16 dot products.

    a linear   its weights once, 2 flops for each weight and row
    lora       the pages of the step's adapters once, 2 flops for each of their weights and row
    attention  K and V of every token so far once, 4 flops for each head element and pair of tokens
    others     their rows in and out once; for sampling the logits

Rows are counted as there are requests: what is padded is the engine's loss.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

from floor import Peaks, measure
from machine import save
from models import write_all
from peers.base import NotSupportedError
from peers.ours import Ours
from report import markdown
from work import (
    ADAPTER_BYTES,
    CASES,
    SHAPES,
    THREADS,
    WEIGHT_BYTES,
    Shape,
    Work,
    adapters_of,
    prompts,
    rank_of,
)

import multilora_kernels as mk
from multilora import SamplingParams
from multilora.engine.engine import Engine
from multilora.sampling.host import HostSampler

STEP, SAMPLING, REST = "whole step", "sampling", "Python and the rest"
OPS = {"lora": "lora_", "rope_store_kv": "rope_store_kv_"}  # by the C++ function


class Stopwatch:
    """Seconds by part of one captured step: its kernels' own, the sampler's, and all."""

    def __init__(self, shape: Shape) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._site = {size: site for site, size in shape.fused.items()}

    def run(self, program: mk.KernelSequence) -> None:
        """`KernelSequence.run`, its calls timed."""
        for name, args, seconds in program.measure():
            self.seconds[self.part(name, args)] += seconds

    def part(self, name: str, args: Any) -> str:
        """A linear is a part for each site; other kernels are one each."""
        if name == "linear":
            return f"linear {self._site[args.in_, args.out]}"
        return OPS.get(name, name)

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, whose time is a part."""

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            found = function(*args, **kwargs)
            self.seconds[part] += time.perf_counter() - start
            return found

        return call

    def step(self, engine: Engine) -> dict[str, float]:
        """The parts of the engine's next step."""
        with (
            patch.object(mk.KernelSequence, "run", lambda program: self.run(program)),
            patch.object(HostSampler, "launch", self.timed(SAMPLING, HostSampler.launch)),
        ):
            start = time.perf_counter()
            engine.step()
            whole = time.perf_counter() - start
        rest = whole - sum(self.seconds.values())
        return {**self.seconds, REST: rest, STEP: whole}


def profile(
    engine: Engine, shape: Shape, rows: list[list[int]], adapters: list[int | None], steps: int
) -> Any:
    """Median seconds of each part over decode steps, and the context in their middle."""
    before = 3  # steps until theirs is captured
    most = steps + before + 2 * len(rows)  # those whose prompt came first are ahead
    params = SamplingParams(temperature=0, max_tokens=most, ignore_eos=True, detokenize=False)
    left = {
        engine.add_request(ids, params, adapter=None if a is None else f"a{a}")
        for ids, a in zip(rows, adapters, strict=True)
    }
    while left:  # until each has its first token
        left -= {output.request_id for output in engine.step() if output.outputs[0].token_ids}
    for _ in range(before):
        engine.step()
    taken = [Stopwatch(shape).step(engine) for _ in range(steps)]
    while engine.has_work:
        engine.step()
    parts = {name: median(t.get(name, 0.0) for t in taken) for name in taken[-1]}
    return parts, len(rows[0]) + 1 + before + steps // 2


def floors(
    shape: Shape, precision: str, adapters: list[int | None], context: int
) -> dict[str, tuple[float, float]]:
    """(flops, bytes) of each part of a decode step."""
    rows, width = len(adapters), 4 if precision == "fp32" else 2
    counts = {
        site: in_ * out * (1 if site == "lm_head" else shape.layers)
        for site, (in_, out) in shape.fused.items()
    }
    found = {
        f"linear {site}": (2.0 * rows * count, count * WEIGHT_BYTES[precision])
        for site, count in counts.items()
    }
    ranks = [rank_of(a) for a in adapters if a is not None]
    used = {a for a in adapters if a is not None}
    lora_bytes = sum(rank_of(a) for a in used) * shape.per_rank * ADAPTER_BYTES[precision]
    found["lora_"] = (2.0 * sum(ranks) * shape.per_rank, lora_bytes)
    kv = 2 * shape.layers * shape.kv_heads * shape.head_dim * context * rows
    found["paged_attention"] = (2.0 * kv * shape.heads / shape.kv_heads, kv * width)
    hidden, inter = shape.layers * shape.hidden * rows, shape.layers * shape.inter * rows
    found["rms_norm"] = (8.0 * hidden, 2 * 4 * hidden * width)  # x and the residual, in and out
    found["silu_mul"] = (4.0 * inter, 3 * inter * width)
    heads = shape.layers * (shape.heads + 2 * shape.kv_heads) * shape.head_dim * rows
    found["rope_store_kv_"] = (3.0 * heads, 2 * heads * width)
    found[SAMPLING] = (rows * shape.vocab, rows * shape.vocab * width)
    found[STEP] = (0.0, 0.0)  # summed by `lines`
    return found


def rate_of(peaks: Peaks, precision: str) -> float:
    """GFLOP/s at best: FMA, or bf16 dot products where our activations have 16 bits."""
    return peaks.rate("fp32" if precision == "fp32" else "bf16", dots=True)


def lines(
    parts: dict[str, float], work: dict[str, tuple[float, float]], rate: float, read: float
) -> list[dict[str, Any]]:
    """Each part with its share of the step and of its floor, the slowest first."""
    least = {name: max(f / rate, b / read) / 1e9 for name, (f, b) in work.items()}
    least[STEP] = sum(least.values())
    rows = []
    for name, seconds in sorted(parts.items(), key=lambda item: -item[1]):
        floor = least.get(name, 0.0)
        rows.append(
            {
                "part": name,
                "ms": seconds * 1e3,
                "share": seconds / parts[STEP],
                "floor_ms": floor * 1e3,
                "of_floor": floor / seconds if seconds else 0.0,
                "lost_ms": (seconds - floor) * 1e3,
            }
        )
    return rows


def show(rows: list[dict[str, Any]]) -> str:
    head = ("part", "ms", "of the step", "floor ms", "% of floor", "lost ms")
    body = [
        (
            row["part"],
            f"{row['ms']:.2f}",
            f"{row['share']:.1%}",
            f"{row['floor_ms']:.3f}",
            f"{row['of_floor']:.0%}",
            f"{row['lost_ms']:.2f}",
        )
        for row in rows
    ]
    return markdown([head, *body])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", default="1b", choices=SHAPES)
    parser.add_argument("--root", type=Path, default=Path("build/bench"))
    parser.add_argument("--precision", default="bf16,int8")
    parser.add_argument("--requests", default="1,8,16")
    parser.add_argument("--case", default="distinct", choices=CASES)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--settings", type=json.loads, default={}, help="our settings, as JSON")
    parser.add_argument("--save", type=Path)
    args = parser.parse_args()
    if not mk.HAS_CPP:
        parser.error("only steps in C++ are captured: the library needs a compiler when installed")
    work = Work(args.work, args.root)
    write_all(work)
    results = []
    for precision in args.precision.split(","):
        try:
            peer = Ours(work, precision, args.threads, args.settings)
        except NotSupportedError as error:
            print(f"{precision}: not supported: {error}")
            continue
        for requests in map(int, args.requests.split(",")):
            adapters = adapters_of(args.case, requests)
            rows = prompts(requests, args.prompt, work.shape.vocab)
            peaks = measure(args.threads)
            parts, context = profile(peer.llm.engine, work.shape, rows, adapters, args.steps)
            peaks = peaks.or_better(measure(args.threads))
            rate = rate_of(peaks, precision)
            work_of = floors(work.shape, precision, adapters, context)
            found = lines(parts, work_of, rate, peaks.read)
            results.append({"precision": precision, "requests": requests, "parts": found})
            results[-1]["peaks"] = asdict(peaks)
            print(f"\n{work.name}, {args.case}, {precision}, {requests} requests: ", end="")
            print(f"{requests / parts[STEP]:.1f} tokens/s; peak {rate} GFLOP/s, {peaks.read} GB/s")
            print(show(found))
    if args.save:
        save(args.save, results, work=args.work, case=args.case, settings=args.settings)


if __name__ == "__main__":
    main()
