"""What thousands of adapters leave behind when each is used once: memory, open files, threads.

    python bench/bench_churn.py --save bench/results/churn.json

Small adapters on disk, each of its own content. Three ways to have each of them answer one request:

    unloaded    `load_adapter` under a name of its own, then `unload_adapter`
    replaced    `load_adapter` under one and the same name
    registered  `register_adapter` under a name of its own, which stays; host memory holds 100

Memory is the resident set after `malloc_trim`, its slope a least-squares line through all samples
but those of the first fifth. `ms` are medians of the first and of the last fifth of the cycles.
"""

from __future__ import annotations

import argparse
import gc
import os
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import linear_regression, median

from checkout import load_checkout
from machine import save
from models import config_of, write_base
from work import SHAPES

load_checkout()

from multilora import Engine, EngineConfig, SamplingParams  # noqa: E402
from multilora.device.cpu import return_freed_memory  # noqa: E402
from tests.harness.adapter_folders import write_adapter  # noqa: E402

SHAPE = SHAPES["tiny"]
RANK, IN_HOST = 8, 100
WAYS = ("unloaded", "replaced", "registered")


@dataclass(frozen=True)
class Churn:
    """What came of one way."""

    way: str
    adapters: int
    first_ms: float  # of a cycle, with its request
    last_ms: float
    mb_per_1000: float
    mb: tuple[float, float]  # resident, at the first sample that counts and at the last
    files: tuple[int, int]  # open, at the fewest and at the most
    threads: tuple[int, int]
    evictions: int  # from host memory

    def row(self) -> str:
        sizes = f"{self.mb[0]:7.1f} {self.mb[1]:7.1f}"
        ends = f"{self.files[0]:3}-{self.files[1]:<3} {self.threads[0]:4}-{self.threads[1]:<3}"
        times = f"{self.first_ms:8.2f} {self.last_ms:7.2f}"
        return f"{self.way:>10} {self.adapters:8,} {self.mb_per_1000:10.3f} {sizes} {ends} {times}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--adapters", type=int, default=5000)
    parser.add_argument("--every", type=int, default=50, help="adapters between two samples")
    parser.add_argument("--save", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        write_base(Path(root) / "base", SHAPE)
        folders = [Path(root) / f"a{i}" for i in range(args.adapters)]
        for i, folder in enumerate(folders):
            write_adapter(folder, config_of(SHAPE), rank=RANK, seed=i)
        print(
            f"{'way':>10} {'adapters':>8} {'MB / 1,000':>10} {'MB':>7} {'to':>7} {'files':>7} "
            f"{'threads':>8} {'ms first':>8} {'ms last':>7}"
        )
        found = []
        for way in WAYS:
            found.append(measure(Path(root) / "base", folders, way, args.every))
            print(found[-1].row(), flush=True)
    if args.save:
        save(args.save, [asdict(one) for one in found], work="tiny", rank=RANK)


def measure(base: Path, folders: list[Path], way: str, every: int) -> Churn:
    """Each folder's adapter answers one request."""
    engine, samples, times, states = make_engine(base), [], [], []
    for i, folder in enumerate(folders):
        start = time.perf_counter()
        use(engine, way, i, folder)
        times.append(1e3 * (time.perf_counter() - start))
        if i % every == every - 1:
            samples.append((i + 1, resident_mb()))
            states.append((len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))))
    engine.check_integrity()
    skipped, part = len(samples) // 5, max(len(times) // 5, 1)
    counted, (files, threads) = samples[skipped:], zip(*states[skipped:], strict=True)
    slope = linear_regression(*zip(*counted, strict=True)).slope
    return Churn(
        way=way,
        adapters=len(folders),
        first_ms=median(times[:part]),
        last_ms=median(times[-part:]),
        mb_per_1000=1e3 * slope,
        mb=(counted[0][1], counted[-1][1]),
        files=(min(files), max(files)),
        threads=(min(threads), max(threads)),
        evictions=engine.stats.adapter_evictions,
    )


def make_engine(base: Path) -> Engine:
    per_adapter = 4 * SHAPE.per_rank * RANK
    return Engine(
        EngineConfig(
            model=str(base),
            skip_tokenizer_init=True,
            max_model_len=64,
            max_num_seqs=4,
            max_loras=8,
            max_host_adapter_bytes=IN_HOST * per_adapter,
        )
    )


def use(engine: Engine, way: str, number: int, folder: Path) -> None:
    """One adapter comes, answers and, as the way has it, goes."""
    name = "one" if way == "replaced" else f"a{number}"
    if way == "registered":
        engine.register_adapter(name, folder)
    else:
        engine.load_adapter(name, folder)
    params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True, detokenize=False)
    engine.add_request([5, 6, 7, 8], params, adapter=name)
    outputs = [output for _ in iter(lambda: engine.has_work, False) for output in engine.step()]
    assert outputs[-1].outputs[0].finish_reason == "length", outputs[-1].error
    if way == "unloaded":
        engine.unload_adapter(name)


def resident_mb() -> float:
    """What lies in memory once all that was freed has gone back to the system."""
    gc.collect()
    return_freed_memory()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


if __name__ == "__main__":
    main()
