"""The floor: how fast this machine could do the work at best. `python bench/floor.py` measures it.

A step takes at least `max(flops / peak, bytes / bandwidth)`, where

    flops = 2 * tokens * body + 2 * logits rows * head + 2 * sum over tokens of rank * per_rank
    bytes = (body + head) * bytes of a weight + sum over the step's adapters of their bytes

`body`, `head` and `per_rank` are parameter counts (`work.Shape`), `peak` is the measured rate of
fp32 FMA and `bandwidth` that of reading memory far larger than the caches, both on all threads. The
prompts are one step with one logits row for each, and every later token is a step of all requests.
Attention, norms, scales of quantised weights and caches are left out. Two floors are given: weights
of 16 bits and less meet fp32 activations in the first, and in the second the machine's bf16 or int8
dot products, where it has any.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import subprocess
import tempfile
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from work import ADAPTER_BYTES, THREADS, WEIGHT_BYTES, Shape, adapters_of, rank_of

if TYPE_CHECKING:
    from collections.abc import Callable

READ = 1 << 28  # bytes
ROUNDS = 1 << 22


@dataclass(frozen=True)
class Peaks:
    """Measured rates on `threads` threads: 10^9 operations (a multiply-add is two) and bytes."""

    threads: int
    fma: float
    bf16_dot: float  # 0 without the instruction
    int8_dot: float
    read: float
    sgemm: float = 0.0  # torch's best square fp32 product, for comparison; 0 without torch

    def rate(self, precision: str, *, dots: bool) -> float:
        """What arithmetic may run at: FMA, or the dot products of the precision if faster."""
        wide = {"fp32": 0.0, "bf16": self.bf16_dot}.get(precision, self.int8_dot)
        return max(self.fma, wide) if dots else self.fma

    def or_better(self, other: Peaks) -> Peaks:
        """The larger of each rate: other work on the machine only ever takes away."""
        return Peaks(**{name: max(v, getattr(other, name)) for name, v in asdict(self).items()})


@dataclass(frozen=True)
class Floor:
    """Seconds."""

    prefill: float
    decode: float

    @property
    def total(self) -> float:
        return self.prefill + self.decode


def floor_of(
    shape: Shape,
    peaks: Peaks,
    precision: str,
    case: str,
    *,
    requests: int,
    prompt: int,
    new: int,
    dots: bool = False,
) -> Floor:
    """The floor of one case."""

    def step(tokens: int) -> float:
        """With as many tokens of each request."""
        chosen = adapters_of(case, requests)
        used = {a for a in chosen if a is not None}
        flops = 2.0 * requests * (tokens * shape.body + shape.head)
        flops += sum(2.0 * tokens * rank_of(a) * shape.per_rank for a in chosen if a is not None)
        bytes_ = (shape.body + shape.head) * WEIGHT_BYTES[precision]
        bytes_ += sum(rank_of(a) * shape.per_rank * ADAPTER_BYTES[precision] for a in used)
        return max(flops / peaks.rate(precision, dots=dots), bytes_ / peaks.read) / 1e9

    return Floor(step(prompt), (new - 1) * step(1))


def measure(threads: int) -> Peaks:
    """Some five seconds. Raises RuntimeError without a C++ compiler."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "probe.so"
        flags = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
        source = Path(__file__).with_name("probe.cpp")
        try:
            subprocess.run(["g++", *flags, "-o", str(library), str(source)], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise RuntimeError("the floor needs g++ (Debian: apt install g++)") from error
        lib = ctypes.CDLL(str(library))
    data = mmap.mmap(-1, READ, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    data.madvise(mmap.MADV_HUGEPAGE)
    start = ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(data)))
    ctypes.memset(start, 1, READ)
    rates = {}
    for name in ("fma", "bf16_dot", "int8_dot"):
        function = getattr(lib, f"{name}_flops")
        function.restype = ctypes.c_double
        rates[name] = best(partial(function, ctypes.c_int64(ROUNDS), threads))
    lib.read_bytes.restype = ctypes.c_double
    rates["read"] = best(lambda: lib.read_bytes(start, ctypes.c_int64(READ // 4), threads))
    return Peaks(threads=threads, sgemm=_sgemm(threads), **rates)


def best(work: Callable[[], float], seconds: float = 1.0) -> float:
    """The best rate in 10^9 per second; `work` returns how much it did."""
    found, end = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        amount = work()
        found = max(found, amount / (time.perf_counter() - start) / 1e9)
    return round(found, 1)


def _sgemm(threads: int, size: int = 2048) -> float:
    try:
        import torch
    except ImportError:
        return 0.0
    torch.set_num_threads(threads)
    a, b = torch.randn(size, size), torch.randn(size, size)

    def work() -> float:
        torch.mm(a, b)
        return 2.0 * size**3

    return best(work)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=THREADS)
    print(json.dumps(asdict(measure(parser.parse_args().threads))))
