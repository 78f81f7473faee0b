"""What asyncio streams cost: the same requests by AsyncEngine and by its engine step by step.

    python bench/bench_async.py                 # a random Llama of 132 million parameters
    python bench/bench_async.py --streams 128
    python bench/bench_async.py --shape tiny    # next to no model: the door itself

One engine serves both ways in turn, on the same thread, 16 adapters of ranks 8 to 64 loaded, every
output a delta; the answers must be the same. A line has medians over the repeats:

    steps/s, streams/s   new tokens each second, prompts included, step by step and by streams
    ratio                of the two in pairs
    us                   of the whole run's time for each output, more by streams than by steps
    gap, in steps        p99 of the times between two outputs of one stream as its reader sees them,
                         in ms and in median steps
    by steps             the same of the outputs of steps
    first                median ms to a stream's first token less that of the steps
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from checkout import load_checkout

load_checkout()

import torch  # noqa: E402
from models import write_all  # noqa: E402
from work import SHAPES, THREADS, Work, prompts  # noqa: E402

from multilora import (  # noqa: E402
    AsyncEngine,
    Engine,
    EngineConfig,
    RequestOutputKind,
    SamplingParams,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine


@dataclass(frozen=True)
class Job:
    ids: list[int]
    params: SamplingParams
    adapter: str


class Run:
    """When outputs came, by request, and their tokens."""

    def __init__(self, count: int) -> None:
        self.start = time.perf_counter()
        self.times: list[list[float]] = [[] for _ in range(count)]
        self.tokens: list[list[int]] = [[] for _ in range(count)]
        self.seconds = 0.0

    def note(self, number: int, tokens: list[int]) -> None:
        self.times[number].append(time.perf_counter())
        self.tokens[number] += tokens

    @property
    def num_outputs(self) -> int:
        return sum(map(len, self.times))

    @property
    def rate(self) -> float:
        return sum(map(len, self.tokens)) / self.seconds

    @property
    def first(self) -> float:
        """Median seconds to a request's first output."""
        return median(times[0] - self.start for times in self.times)

    @property
    def gaps(self) -> list[float]:
        """Sorted seconds between two outputs of one request."""
        pairs = (pair for times in self.times for pair in itertools.pairwise(times))
        return sorted(later - before for before, later in pairs)

    @property
    def p99(self) -> float:
        return self.gaps[int(0.99 * (len(self.gaps) - 1))]


Pairs = list[tuple[Run, Run]]


def main() -> None:
    show(measured(__doc__, 32, measure))


def measured(
    doc: str,
    streams: int,
    measure: Callable[[Work, argparse.Namespace], Coroutine[Any, Any, Pairs]],
) -> Pairs:
    """What `measure` gives, for a model that is written for it and what the command line says."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--shape", default="132m", choices=SHAPES)
    parser.add_argument("--streams", type=int, default=streams)
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of a request")
    parser.add_argument("--interval", type=int, default=1, help="stream_interval")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory() as root:
        work = Work(args.shape, Path(root))
        write_all(work)
        return asyncio.run(measure(work, args))


def plan(work: Work, args: argparse.Namespace) -> tuple[EngineConfig, list[Job]]:
    """The engine, and the requests that it gets."""
    params = SamplingParams(
        temperature=0,
        max_tokens=args.tokens,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        stream_interval=args.interval,
    )
    rows = prompts(args.streams, args.prompt, work.shape.vocab)
    names = [folder.name for folder in work.adapters]
    jobs = [Job(ids, params, names[i % len(names)]) for i, ids in enumerate(rows)]
    config = EngineConfig(
        model=str(work.base),
        skip_tokenizer_init=True,
        max_model_len=args.prompt + args.tokens,
        max_num_seqs=args.streams,
        enable_prefix_caching=False,  # or only the first run would compute the prompts
    )
    return config, jobs


async def measure(work: Work, args: argparse.Namespace) -> Pairs:
    """The same requests, step by step and by streams, so many times; the first pair is left out."""
    config, jobs = plan(work, args)
    pairs = []
    async with AsyncEngine(config) as engine:
        for folder in work.adapters:
            await engine.load_adapter(folder.name, folder)
        for _ in range(args.repeats + 1):
            stepped = await engine.call(lambda inner: by_steps(inner, jobs))
            streamed = await by_streams(engine, jobs)
            assert streamed.tokens == stepped.tokens, "the answers differ"
            pairs.append((stepped, streamed))
    return pairs[1:]


def by_steps(engine: Engine, jobs: list[Job]) -> Run:
    run = Run(len(jobs))
    numbers = {
        engine.add_request(job.ids, job.params, adapter=job.adapter): i
        for i, job in enumerate(jobs)
    }
    while engine.has_work:
        for output in engine.step():
            run.note(numbers[output.request_id], output.outputs[0].token_ids)
    run.seconds = time.perf_counter() - run.start
    return run


async def by_streams(engine: AsyncEngine, jobs: list[Job]) -> Run:
    run = Run(len(jobs))

    async def read(number: int, job: Job) -> None:
        async for output in engine.generate(job.ids, job.params, adapter=job.adapter):
            run.note(number, output.outputs[0].token_ids)

    await asyncio.gather(*(read(i, job) for i, job in enumerate(jobs)))
    run.seconds = time.perf_counter() - run.start
    return run


def show(pairs: Pairs) -> None:
    def of(value: Callable[[Run, Run], float]) -> float:
        return median(value(stepped, streamed) for stepped, streamed in pairs)

    step = of(lambda stepped, _: median(stepped.gaps))
    columns = {
        "steps/s": f"{of(lambda a, _: a.rate):.0f}",
        "streams/s": f"{of(lambda _, b: b.rate):.0f}",
        "ratio": f"{of(lambda a, b: b.rate / a.rate):.3f}",
        "us": f"{of(lambda a, b: 1e6 * (b.seconds - a.seconds) / a.num_outputs):.1f}",
        "gap ms": f"{of(lambda _, b: 1e3 * b.p99):.1f}",
        "in steps": f"{of(lambda _, b: b.p99) / step:.2f}",
        "by steps": f"{of(lambda a, _: a.p99) / step:.2f}",
        "first ms": f"{of(lambda a, b: 1e3 * (b.first - a.first)):.1f}",
    }
    print_row(columns)


def print_row(columns: dict[str, str]) -> None:
    print(*(f"{name:>9}" for name in columns))
    print(*(f"{value:>9}" for value in columns.values()))


if __name__ == "__main__":
    main()
