"""From 5 to 2,000 registered adapters with memory for 16 on the device: throughput and hit rates.

    python bench/bench_registered.py --save bench/results/registered.json

A random Llama of 132 million parameters in bf16 and adapters of rank 8 (2.75 MB each, 5.5 GB on
disk). A closed loop: 32 clients each ask for an adapter, wait for the answer and ask again; 16 run
at once, prompts and answers have 8 to 128 tokens, the same ones in every row. Adapters are drawn by
Zipf's law (s = 1) or uniformly. `host` says how many of them have room in host memory; the others
lie on disk, in files that the system has cached. Rows are interleaved, `tokens/s` are medians of
the rounds, `drop` is the median over the rounds of what is lost beside 5 adapters.

    device, host, disk    where a request's adapter was when it came: of all requests

Then the time to the first token of a single request, by the size of its adapter (fp32) and by
where that is: on the device, in host memory, in a file that the system has cached, in one that it
has not.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from checkout import load_checkout
from machine import save
from models import config_of
from work import SHAPES, THREADS, Shape

load_checkout()

import torch  # noqa: E402

from multilora import Engine, EngineConfig, RequestOutputKind, SamplingParams  # noqa: E402
from multilora.device.cpu import return_freed_memory  # noqa: E402
from tests.harness.adapter_folders import write_adapter  # noqa: E402
from tests.harness.model_folders import hf_config  # noqa: E402

RESIDENT, CLIENTS, RANK, LENGTHS = 16, 32, 8, (8, 128)
LEAST_STEPS = 100  # of a turn
LAWS = ("zipf", "uniform")
RANKS = (16, 144, 584)  # of the 132M shape in fp32: 11, 99 and 402 MB
COPIES = 3  # adapters of each


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="132m", choices=SHAPES)
    parser.add_argument("--registered", default="5,16,200,2000")
    parser.add_argument("--in-host", type=int, default=200, help="of the most, in one row more")
    parser.add_argument("--seconds", type=float, default=8, help="of each row in each round")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--ranks", default=",".join(map(str, RANKS)), help="of the first tokens")
    parser.add_argument("--save", type=Path)
    args = parser.parse_args()
    counts = [int(count) for count in args.registered.split(",")]
    ranks = [int(rank) for rank in args.ranks.split(",")]
    with tempfile.TemporaryDirectory() as root:
        loops = closed_loops(Path(root), SHAPES[args.shape], counts, args)
        return_freed_memory()
        firsts = first_tokens(Path(root), SHAPES[args.shape], ranks)
    if args.save:
        results = [*(asdict(loop) for loop in loops), *firsts]
        save(args.save, results, work=args.shape, rank=RANK, threads=THREADS)


# Closed loops -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """A row: what came of one number of adapters under one law."""

    law: str
    registered: int
    host: int
    rate: float  # tokens generated a second
    drop: float  # beside the fewest adapters
    device: float  # shares of the requests
    in_host: float
    disk: float
    loads: int
    evictions: int
    first: tuple[float, float]  # seconds to the first token: median, and of 99%
    requests: int

    def row(self) -> str:
        shares = " ".join(f"{share:7.1%}" for share in (self.device, self.in_host, self.disk))
        ends = f"{self.loads:6} {1e3 * self.first[0]:9.0f} {1e3 * self.first[1]:8.0f}"
        head = f"{self.law:>8} {self.registered:10,} {self.host:6,}"
        return f"{head} {self.rate:9.1f} {self.drop:6.1%} {shares} {ends}"


def closed_loops(
    root: Path, shape: Shape, counts: list[int], args: argparse.Namespace
) -> list[Found]:
    folders = [root / f"a{i}" for i in range(max(counts))]
    for i, folder in enumerate(folders):
        write_adapter(folder, config_of(shape), rank=RANK, seed=i, dtype=torch.bfloat16, scale=None)
    print(f"{'law':>8} {'registered':>10} {'host':>6} {'tokens/s':>9} {'drop':>6} {'device':>7} "
          f"{'host':>7} {'disk':>7} {'loads':>6} {'first ms':>9} {'p99':>8}")  # fmt: skip
    rows = [(count, count) for count in counts]
    rows += [(max(counts), args.in_host)] if args.in_host < max(counts) else []
    engines = [made(root, shape, folders[:count], host) for count, host in rows]
    found = []
    for law in LAWS:
        loops = [Loop(engine, law, row[0]) for engine, row in zip(engines, rows, strict=True)]
        for loop in loops:
            loop.run(2 * args.seconds)
            loop.forget()
        for _ in range(args.rounds):
            for loop in loops:
                loop.run(args.seconds)
        for loop, (_, host) in zip(loops, rows, strict=True):
            found.append(loop.found(loops[0], host))
            print(found[-1].row(), flush=True)
            loop.drain()
    return found


def made(root: Path, shape: Shape, folders: list[Path], host: int) -> Engine:
    """An engine that has read as many adapters as host memory takes, the most asked for last."""
    per_adapter = 2 * shape.per_rank * RANK
    engine = make_engine(
        root,
        shape,
        dtype="bfloat16",
        max_num_seqs=RESIDENT,
        max_loras=RESIDENT,
        lora_pages=RESIDENT * RANK // 8,
        max_host_adapter_bytes=host * per_adapter,
    )
    for i, folder in enumerate(folders):
        engine.register_adapter(f"a{i}", folder)
    names = [f"a{i}" for i in reversed(range(host))]
    for start in range(0, host, RESIDENT):
        for name in names[start : start + RESIDENT]:
            ask(engine, name, [5, 6, 7], 1)
        while engine.has_work:
            engine.step()
    return engine


class Loop:
    """Clients of one engine that ask for adapters by one law."""

    def __init__(self, engine: Engine, law: str, count: int) -> None:
        self.engine, self.law, self.count = engine, law, count
        self.clock = 0.0  # seconds of its own turns
        self.asked: dict[str, float] = {}  # when, by request without a token
        self.weights = [1 / (1 + i) if law == "zipf" else 1.0 for i in range(count)]
        self.names, self.sizes = random.Random(1), random.Random(2)
        self.forget()

    def forget(self) -> None:
        """Begins to count."""
        self.rates: list[float] = []
        self.firsts: list[float] = []
        self.before = self.counters()

    def counters(self) -> dict[str, int]:
        stats = self.engine.stats
        return {
            "hits": stats.adapter_hits,
            "misses": stats.adapter_misses,
            "loads": stats.adapter_loads,
            "evictions": stats.adapter_evictions,
            "copies": self.engine.store.num_copies,
        }

    def run(self, seconds: float) -> None:
        """A turn of so many seconds; its requests go on in the next one."""
        engine, begin = self.engine, self.clock
        generated, steps = engine.stats.generated_tokens, engine.stats.steps
        start = time.perf_counter()
        while self.clock - begin < seconds or engine.stats.steps - steps < LEAST_STEPS:
            for _ in range(CLIENTS - len(engine.request_ids)):
                self.ask()
            outputs = engine.step()
            self.clock = begin + time.perf_counter() - start
            for output in outputs:
                assert output.error is None, output.error
                if (asked := self.asked.pop(output.request_id, None)) is not None:
                    self.firsts.append(self.clock - asked)
        generated = engine.stats.generated_tokens - generated
        self.rates.append(generated / (self.clock - begin))

    def ask(self) -> None:
        [number] = self.names.choices(range(self.count), self.weights)
        length, count = self.sizes.randint(*LENGTHS), self.sizes.randint(*LENGTHS)
        ids = self.sizes.choices(range(3, self.engine.model_config.vocab_size), k=length)
        self.asked[ask(self.engine, f"a{number}", ids, count)] = self.clock

    def drain(self) -> None:
        for request in self.engine.request_ids:
            self.engine.abort(request)

    def found(self, fewest: Loop, host: int) -> Found:
        after = self.counters()
        count = {name: after[name] - self.before[name] for name in after}
        asked = count["hits"] + count["misses"]
        firsts = sorted(self.firsts)
        on_device = max(1 - count["copies"] / asked, 0.0)
        return Found(
            law=self.law,
            registered=self.count,
            host=host,
            rate=median(self.rates),
            drop=median(1 - a / b for a, b in zip(self.rates, fewest.rates, strict=True)),
            device=on_device,
            in_host=count["hits"] / asked - on_device,
            disk=count["misses"] / asked,
            loads=count["loads"],
            evictions=count["evictions"],
            first=(median(firsts), firsts[int(0.99 * (len(firsts) - 1))]),
            requests=asked,
        )


def make_engine(root: Path, shape: Shape, **settings: Any) -> Engine:
    base = root / "base"
    base.mkdir(exist_ok=True)
    (base / "config.json").write_text(json.dumps(hf_config(config_of(shape))))
    return Engine(
        EngineConfig(
            model=str(base),
            load_format="dummy",
            skip_tokenizer_init=True,
            enable_prefix_caching=False,
            max_model_len=512,
            **settings,
        )
    )


def ask(engine: Engine, adapter: str, ids: list[int], count: int) -> str:
    params = SamplingParams(
        temperature=0,
        max_tokens=count,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )
    return engine.add_request(ids, params, adapter=adapter)


# First tokens -------------------------------------------------------------------------------------


def first_tokens(root: Path, shape: Shape, ranks: list[int]) -> list[dict[str, Any]]:
    """Of each rank the megabytes in host memory, and milliseconds to the first token by place."""
    largest = -(-max(ranks) // 8) * 8  # it leaves no page to any other
    engine = make_engine(
        root, shape, dtype="float32", max_lora_rank=largest, lora_pages=largest // 8
    )
    folders = {}
    for rank in ranks:
        for i in range(COPIES):
            name = f"r{rank}-{i}"
            folders[name] = root / name
            write_adapter(folders[name], config_of(shape), rank=rank, seed=i, scale=None)
            engine.register_adapter(name, folders[name])
    print(f"\n{'MB':>8} {'device ms':>10} {'host':>8} {'cached file':>12} {'file':>8}")
    results = []
    for rank in ranks:
        names = [f"r{rank}-{i}" for i in range(COPIES)]
        times: dict[str, list[float]] = {place: [] for place in PLACES}
        for name in names:
            other = next(n for n in folders if n.startswith(f"r{max(ranks)}-") and n != name)
            for place, prepare in PLACES.items():
                answer(engine, name if place == "device" else other)
                prepare(engine, name, folders[name])
                times[place].append(answer(engine, name))
        size = engine.adapters[names[0]].num_bytes / 1e6
        found = {place: median(values) for place, values in times.items()}
        results.append({"rank": rank, "mb": size, **found})
        print(f"{size:8.1f} {found['device']:10.1f} {found['host']:8.1f} "
              f"{found['cached file']:12.1f} {found['file']:8.1f}", flush=True)  # fmt: skip
    return results


def stay(engine: Engine, name: str, folder: Path) -> None:
    """The adapter is where the requests before have left it."""


def leave_host(engine: Engine, name: str, folder: Path) -> None:
    """Forgets what was read, as a bound of host memory does."""
    engine.register_adapter(name, folder)


def leave_cache(engine: Engine, name: str, folder: Path) -> None:
    """Has the system forget the file, too."""
    leave_host(engine, name, folder)
    file = os.open(folder / "adapter_model.safetensors", os.O_RDONLY)
    os.fsync(file)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(file)


PLACES: dict[str, Callable[[Engine, str, Path], None]] = {
    "device": stay,
    "host": stay,
    "cached file": leave_host,
    "file": leave_cache,
}


def answer(engine: Engine, name: str) -> float:
    """Milliseconds from a request to its first and only token."""
    start = time.perf_counter()
    ask(engine, name, [5, 6, 7, 8], 1)
    while engine.has_work:
        engine.step()
    return 1e3 * (time.perf_counter() - start)


if __name__ == "__main__":
    main()
