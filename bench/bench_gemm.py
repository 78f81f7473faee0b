"""Linears of a model on a CPU, for few rows and many: ours beside torch's and the floor.

    python bench/bench_gemm.py --work 132m --precision fp32,bf16,int8,int4 --rows 1,4,16,64,512,2048

Every linear has as many copies as fill `COLD` bytes, and they take turns, as layers do: few rows
read their weights from memory. Ours are timed in C++, torch's `linear` of x's type, not quantised,
around its call; both in every round. The floor is `max(flops / peak, bytes of weights / bandwidth)`
as in bench_step.py; `GB/s` are ours. int8 has one scale for an output, int4 one for 32 inputs, the
engine's defaults (which keep an int4 model's head at int8). Before it is timed, some of each result
is compared with the definition.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch
from bench_step import rate_of
from floor import measure
from machine import save
from report import markdown
from torch import Tensor
from torch.nn.functional import linear
from work import SHAPES, THREADS, WEIGHT_BYTES

import multilora_kernels as mk
from multilora_kernels.testing.precision import assert_close

COLD = 128 << 20
QUANTIZED = {"int8": (8, None), "int4": (4, 32)}  # bits, group


def packed(weight: Tensor, precision: str) -> mk.PackedWeight:
    """A weight [out, in] in our layout."""
    if precision not in QUANTIZED:
        return mk.pack(weight)
    bits, group = QUANTIZED[precision]
    return mk.pack_quantized(*mk.quantize(weight, bits, group), bits, group or weight.shape[1])


class Copies:
    """A linear [out, in] of random weights, as often as `COLD` bytes hold it."""

    def __init__(self, in_: int, out: int, precision: str) -> None:
        self.dtype = torch.float32 if precision == "fp32" else torch.bfloat16
        self.in_, self.out, self.bytes = in_, out, in_ * out * WEIGHT_BYTES[precision]
        count = math.ceil(COLD / self.bytes)
        self.weights = [torch.randn(out, in_, dtype=self.dtype) for _ in range(count)]
        self.packed = [packed(weight, precision) for weight in self.weights]

    def check(self, x: Tensor) -> None:
        """Some columns of our result against the definition."""
        some = torch.randperm(self.out)[:64]
        expected = mk.reference.linear(x, mk.unpack_rows(self.packed[0], some))
        assert_close(mk.linear(x, self.packed[0])[:, some], expected)

    def timed(self, rows: int, rounds: int) -> tuple[float, float]:
        """Median seconds of ours and of torch's; the results of one round are `COLD` bytes."""
        count = math.ceil(COLD / (self.bytes + rows * self.out * self.dtype.itemsize))
        values = torch.randn(rows, self.in_) * self.in_**-0.5
        x = mk.empty_huge((rows, self.in_), self.dtype).copy_(values)
        self.check(x)
        ours: list[float] = []
        torchs: list[float] = []
        with mk.capture(mk.BufferPool()) as captured:
            for weight in self.packed[:count]:
                mk.linear(x, weight)
        calls = captured.take()  # they keep their results
        program = mk.KernelSequence(calls)
        for _ in range(rounds):
            ours += [seconds for *_, seconds in program.measure()]
            for dense in self.weights[:count]:
                start = time.perf_counter()
                linear(x, dense)
                torchs.append(time.perf_counter() - start)
        return median(ours), median(torchs)


def show(found: list[dict[str, Any]]) -> str:
    head = ("linear", "in", "out", "rows", "ms", "GFLOP/s", "GB/s", "% of floor", "torch ms", "x")
    body = [
        (
            row["site"],
            str(row["in"]),
            str(row["out"]),
            str(row["rows"]),
            f"{row['ours'] * 1e3:.3f}",
            f"{row['flops'] / row['ours'] / 1e9:.0f}",
            f"{row['bytes'] / row['ours'] / 1e9:.1f}",
            f"{row['floor'] / row['ours']:.0%}",
            f"{row['torch'] * 1e3:.3f}",
            f"{row['torch'] / row['ours']:.2f}",
        )
        for row in found
    ]
    return markdown([head, *body])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", default="132m", choices=SHAPES)
    parser.add_argument("--precision", default="fp32,bf16,int8,int4")
    parser.add_argument("--rows", default="1,4,8,16,32,64,128,512,2048")
    parser.add_argument("--sites", default="qkv,o,gate_up,down,lm_head")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--save", type=Path)
    args = parser.parse_args()
    if not mk.HAS_CPP:
        parser.error("our products are C++: the library needs a compiler when installed")
    torch.set_num_threads(args.threads)
    results = []
    for precision in args.precision.split(","):
        found = []
        peaks = measure(args.threads)
        for site in args.sites.split(","):
            in_, out = SHAPES[args.work].fused[site]
            copies = Copies(in_, out, precision)
            for rows in map(int, args.rows.split(",")):
                ours, torchs = copies.timed(rows, args.rounds)
                found.append(
                    {"site": site, "in": in_, "out": out, "rows": rows,
                     "flops": 2.0 * rows * in_ * out, "bytes": copies.bytes,
                     "ours": ours, "torch": torchs}
                )  # fmt: skip
        peaks = peaks.or_better(measure(args.threads))
        rate = rate_of(peaks, precision)
        for row in found:
            row["floor"] = max(row["flops"] / rate, row["bytes"] / peaks.read) / 1e9
        print(f"\n{args.work}, {precision}; peak {rate} GFLOP/s, {peaks.read} GB/s")
        print(show(found))
        results.append({"precision": precision, "peaks": asdict(peaks), "linears": found})
    if args.save:
        save(args.save, results, work=args.work)


if __name__ == "__main__":
    main()
