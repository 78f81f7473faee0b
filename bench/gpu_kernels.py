"""Part "kernels" of `bench/gpu.py`: LoRA at the sites of Llama 3.1 8B, and attention.

Each case is a captured chain of calls on different weights, as in the layers of a model. It is
timed against torch's two usual ways: a gather of whole matrices with `bmm`, a loop over adapters.
"""

from __future__ import annotations

import itertools
import math
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import gpu_sglang
import gpu_vllm
import torch
from gpu_common import Clock, Report, copy_bandwidth, parse, say
from torch import Tensor

import multilora_kernels as mk
from multilora.config.lora_sites import sites_of
from multilora.config.model import ModelConfig
from multilora.config.presets import SHAPES
from multilora.device.cpu import Device

POPULARITIES = ("identical", "uniform", "zipf", "distinct")
RANKS = (8, 16, 64, "mixed")
MIXED = (8, 16, 32, 64)
BATCHES = (1, 32, 8, 64, 256, 128)  # the most telling first: time may run out
TOLERANCE = 0.05  # of the largest change: bf16 sums in another order
COLD = 200 << 20  # bytes of weights in a chain: several times any L2 cache


@dataclass(frozen=True)
class Case:
    """One cell of the table."""

    site: str
    batch: int
    popularity: str
    rank: int | str


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    dtype: torch.dtype
    batches: tuple[int, ...]
    repeat: int
    cold: int  # bytes of weights in a chain
    max_sets: int


class Problem:
    """The tensors of a case: one input, and several sets of weights to rotate over."""

    def __init__(self, case: Case, plan: Plan, device: Device, config: ModelConfig) -> None:
        site = sites_of(config)[case.site]
        slots = slots_of(case.popularity, case.batch)
        self.slots, self.starts = slots, site.slice_starts
        ranks = [rank_of(case.rank, i) for i in range(max(slots) + 1)]
        self.ranks, slices = ranks, len(site.slices)
        pages = [rank // 8 for rank in ranks]
        per_set = sum(ranks) * (slices * site.in_ + site.out) * plan.dtype.itemsize
        count = max(2, min(plan.max_sets, math.ceil(plan.cold / per_set)))

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=plan.dtype, device=device.torch)

        # The change is as large as y: smaller, it would drown in y's own rounding.
        self.sets = [
            (
                normal(sum(pages), slices, 8, site.in_).mul_(site.in_**-0.5),
                normal(sum(pages), 8, site.out).mul_(min(ranks) ** -0.5),
            )
            for _ in range(count)
        ]
        self.x, self.y = normal(case.batch, site.in_), normal(case.batch, site.out)
        self.table = table_of(pages, device)
        tile = mk.DECODE_TILE
        self.tiles = mk.Tiles(*(t.to(device.torch) for t in mk.make_tiles(slots, tile)))
        traffic = case.batch * (site.in_ + 2 * site.out) * plan.dtype.itemsize
        self.bytes = per_set + traffic

    def ours(self) -> list[Callable[[], Tensor]]:
        def one(a: Tensor, b: Tensor) -> Callable[[], Tensor]:
            def call() -> Tensor:
                mk.lora_(self.y, self.x, a, b, self.table, self.tiles, self.starts)
                return self.y

            return call

        return [one(a, b) for a, b in self.sets]

    def dense(self) -> list[tuple[Tensor, Tensor]]:
        """The weights as others want them: A [adapters, slices, rank, in], B [adapters, rank, out].

        Ranks are padded to the largest.
        """
        most = max(self.ranks)
        found = []
        for a, b in self.sets:
            slices, in_, out = a.shape[1], a.shape[3], b.shape[2]
            a_all = a.new_zeros(len(self.ranks), slices, most, in_)
            b_all = b.new_zeros(len(self.ranks), most, out)
            for slot, rank in enumerate(self.ranks):
                ids = self.table.page_ids[slot, : rank // 8].long()
                a_all[slot, :, :rank] = a[ids].transpose(0, 1).flatten(1, 2)
                b_all[slot, :rank] = b[ids].flatten(0, 1)
            found.append((a_all, b_all))
        return found

    def gathered(self, dense: list[tuple[Tensor, Tensor]]) -> list[Callable[[], Tensor]]:
        """torch: gathers each row's own matrices, then two `bmm` for each slice."""
        index = torch.tensor(self.slots, device=self.x.device)

        def one(a: Tensor, b: Tensor) -> Callable[[], Tensor]:
            def call() -> Tensor:
                for s, (first, last) in enumerate(itertools.pairwise(self.starts)):
                    u = torch.bmm(a[:, s][index], self.x[:, :, None])  # [rows, rank, 1]
                    delta = torch.bmm(u.transpose(1, 2), b[index, :, first:last])
                    self.y[:, first:last] += delta[:, 0]
                return self.y

            return call

        return [one(a, b) for a, b in dense]

    def looped(self, dense: list[tuple[Tensor, Tensor]]) -> list[Callable[[], Tensor]]:
        """torch: one adapter after the other, each on its own rows."""
        runs = [
            (slot, self.slots.index(slot), self.slots.index(slot) + self.slots.count(slot))
            for slot in sorted(set(self.slots))
        ]

        def one(a: Tensor, b: Tensor) -> Callable[[], Tensor]:
            def call() -> Tensor:
                for slot, first, last in runs:
                    x, y, rank = self.x[first:last], self.y[first:last], self.ranks[slot]
                    for s, (lo, hi) in enumerate(itertools.pairwise(self.starts)):
                        y[:, lo:hi] += (x @ a[slot, s, :rank].T) @ b[slot, :rank, lo:hi]
                return self.y

            return call

        return [one(a, b) for a, b in dense]

    def error_of(self, way: Callable[[], Tensor]) -> float:
        """The largest difference from the loop, relative to the largest change."""
        start = self.y.clone()
        results = []
        for call in (way, self.looped(self.dense()[:1])[0]):
            self.y.copy_(start)
            results.append(call().float() - start.float())
        self.y.copy_(start)
        return float((results[0] - results[1]).abs().max() / results[1].abs().max())


def slots_of(popularity: str, batch: int) -> list[int]:
    """The slot of each row, in order; the number of adapters is that of the Punica paper."""
    if popularity == "identical":
        return [0] * batch
    if popularity == "distinct":
        return list(range(batch))
    if popularity == "uniform":
        count = math.isqrt(batch - 1) + 1
        return sorted(i % count for i in range(batch))
    draw = random.Random(0)
    weights = [1 / (i + 1) ** 1.5 for i in range(batch)]
    drawn = draw.choices(range(batch), weights, k=batch)
    names = {slot: i for i, slot in enumerate(sorted(set(drawn)))}
    return sorted(names[slot] for slot in drawn)


def rank_of(rank: int | str, slot: int) -> int:
    return rank if isinstance(rank, int) else MIXED[slot % len(MIXED)]


def table_of(pages: list[int], device: Device) -> mk.Table:
    """A table in which slot i has `pages[i]` pages, shuffled as after much coming and going."""
    order = list(range(sum(pages)))
    random.Random(0).shuffle(order)
    page_ids = torch.zeros(len(pages), max(pages), dtype=torch.int32)
    start = 0
    for slot, count in enumerate(pages):
        page_ids[slot, :count] = torch.tensor(order[start : start + count], dtype=torch.int32)
        start += count
    return mk.Table(
        page_ids.to(device.torch),
        torch.ones(page_ids.shape, dtype=torch.float32, device=device.torch),
        torch.tensor(pages, dtype=torch.int32, device=device.torch),
    )


def cases(batches: tuple[int, ...]) -> Iterator[Case]:
    """All cells; rank 16 of the widest and of the deepest site first."""
    sites = ("gate_up", "qkv", "down", "o")
    ranks = sorted(RANKS, key=lambda rank: (rank != 16, rank != "mixed"))
    for rank, batch, site, popularity in itertools.product(ranks, batches, sites, POPULARITIES):
        yield Case(site, batch, popularity, rank)


def ways(problem: Problem) -> dict[str, list[Callable[[], Tensor]]]:
    """Ours and others', one call for each set of weights."""
    dense, x, y = problem.dense(), problem.x, problem.y
    found = {
        "ours": problem.ours(),
        "bmm_gather": problem.gathered(dense),
        "loop": problem.looped(dense),
    }
    vllm = gpu_vllm.ways(x, y, problem.slots, problem.starts, dense)
    if vllm is not None:
        found["vllm"] = vllm
    return found | gpu_sglang.ways(x, y, problem.slots, problem.ranks, problem.starts, dense)


def measure(case: Case, problem: Problem, repeat: int, bench: Bench) -> None:
    """Times a case in all ways; a result that is wrong is an error, not a number."""
    error = problem.error_of(problem.ours()[0])
    if not error <= TOLERANCE:
        bench.report.fail(f"{case}: ours differs from the loop by {error:.2%}")
        return
    found: dict[str, object] = {}
    for name, steps in ways(problem).items():
        try:
            wrong = problem.error_of(steps[0])
            if not wrong <= TOLERANCE:
                raise ArithmeticError(f"differs from the loop by {wrong:.2%}")
            times = bench.clock.of_graph(steps, repeat)
        except Exception as error:  # of another project; ours was checked
            found[name] = f"{type(error).__name__}: {error}"
            continue
        found[name] = {
            "microseconds": [round(t * 1e6, 3) for t in times],
            "gigabytes_per_second": round(problem.bytes / times[0] / 1e9, 2),
            "percent_of_copy": round(100 * problem.bytes / times[0] / bench.copy, 1),
        }
    bench.report.add(
        kind="lora", **vars(case), bytes=problem.bytes, sets=len(problem.sets), error=error, **found
    )


@dataclass(frozen=True)
class Bench:
    """What all cases share."""

    device: Device
    clock: Clock
    report: Report
    copy: float  # bytes per second


@dataclass(frozen=True)
class Attention:
    """A shape of attention: the last `queries` tokens of `seqs` sequences of `length` tokens."""

    seqs: int
    length: int
    queries: int
    heads: int = 32
    kv_heads: int = 8
    dim: int = 128


def attend(case: Attention, plan: Plan, bench: Bench) -> None:
    """Times attention over two sets of KV pages."""
    device, size = bench.device.torch, 16
    blocks = case.seqs * case.length // size
    shape = (2, blocks, size, case.kv_heads, case.dim)
    sets = [torch.randn(shape, device=device).to(plan.dtype) for _ in range(2)]
    q = torch.randn(case.seqs * case.queries, case.heads, case.dim, device=device).to(plan.dtype)
    table = torch.randperm(blocks, device=device).view(case.seqs, -1).int()
    lens = torch.full((case.seqs,), case.length, dtype=torch.int32, device=device)
    starts = (torch.arange(case.seqs + 1, device=device) * case.queries).int()

    def one(kv: Tensor) -> Callable[[], Tensor]:
        return lambda: mk.paged_attention(
            q,
            *kv.unbind(0),
            table,
            lens,
            starts,
            scale=case.dim**-0.5,
            max_query_len=case.queries,
            max_seq_len=case.length,
        )

    times = bench.clock.of_graph([one(kv) for kv in sets], plan.repeat)
    num_bytes = sets[0].nbytes
    seen = case.length - (case.queries - 1) / 2  # tokens that a query sees, on average
    flops = 4 * case.heads * case.dim * case.seqs * case.queries * seen
    bench.report.add(
        kind="attention",
        **vars(case),
        microseconds=[round(t * 1e6, 3) for t in times],
        percent_of_copy=round(100 * num_bytes / times[0] / bench.copy, 1),
        teraflops=round(flops / times[0] / 1e12, 3),
    )


def main() -> int:
    args, device, report = parse(__doc__ or "")
    config, plan = SHAPES["llama-3.1-8b"], Plan(torch.bfloat16, BATCHES, 30, COLD, 32)
    shapes = [Attention(32, 4096, 1), Attention(1, 8192, 1), Attention(64, 1024, 1)]
    shapes.append(Attention(1, 8192, 2048))
    if args.rehearse:
        from tests.checkpoints import TINY

        config, plan = TINY, Plan(torch.bfloat16, (1, 4), 2, 1 << 14, 2)
        shapes = [Attention(2, 32, 1, 4, 2, 16), Attention(1, 64, 16, 4, 2, 16)]
    torch.manual_seed(0)
    copy = copy_bandwidth(device, 1 << (20 if args.rehearse else 30))
    bench = Bench(device, Clock(device), report, copy)
    report.content["copy_gigabytes_per_second"] = round(copy / 1e9, 1)
    report.content["vllm"], report.content["sglang"] = gpu_vllm.state(), gpu_sglang.state()
    with torch.inference_mode():
        for shape in shapes:
            attend(shape, plan, bench)
        for case in cases(plan.batches):
            if report.seconds_left < 5 and not args.rehearse:
                report.leave_out(case)
                continue
            measure(case, Problem(case, plan, device, config), plan.repeat, bench)
    report.write()
    say(f"copy {copy / 1e9:.0f} GB/s, {len(report.content['results'])} cases")
    return report.status


if __name__ == "__main__":
    sys.exit(main())
