"""Part "kernels" of `bench/gpu.py`: LoRA at the sites of Llama 3.1 8B, and attention.

Each case is a captured chain of calls on different weights, as in the layers of a model, none of
which is in a cache when it begins. It is timed against torch's two usual ways: a gather of whole
matrices with `bmm`, a loop over adapters.
"""

from __future__ import annotations

import itertools
import math
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import gpu_model
import gpu_sglang
import gpu_vllm
import torch
from gpu_attention import Attention, attend
from gpu_common import parse, say
from gpu_timing import EVICT, Bench, l2_bytes, open_bench, sets_of
from torch import Tensor

import multilora_kernels as mk
from multilora.config.lora_sites import Site, sites_of
from multilora.config.model import ModelConfig
from multilora.config.presets import SHAPES
from multilora.device.cpu import Device

POPULARITIES = ("identical", "uniform", "zipf", "distinct")
RANKS = (8, 16, 64, "mixed")
MIXED = (8, 16, 32, 64)
BATCHES = (1, 32, 8, 64, 256, 128)  # the most telling first: time may run out
TOLERANCE = 0.05  # of the largest change: bf16 sums in another order


@dataclass(frozen=True)
class Case:
    """One cell of the table."""

    site: str
    batch: int
    popularity: str
    rank: int | str

    def __str__(self) -> str:
        return f"{self.site}, batch {self.batch}, {self.popularity}, rank {self.rank}"

    @property
    def slots(self) -> list[int]:
        """The slot of each row."""
        return slots_of(self.popularity, self.batch)

    @property
    def ranks(self) -> list[int]:
        """The rank of each adapter."""
        return [rank_of(self.rank, i) for i in range(max(self.slots) + 1)]

    def weight_bytes(self, site: Site, itemsize: int) -> int:
        """Bytes of all adapters at the site, each once."""
        return sum(self.ranks) * (len(site.slices) * site.in_ + site.out) * itemsize


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    dtype: torch.dtype
    batches: tuple[int, ...]
    repeat: int
    cold: int  # bytes of weights in a chain, unless they are too many calls


class Problem:
    """The tensors of a case: one input, and several sets of weights to rotate over."""

    def __init__(self, case: Case, plan: Plan, device: Device, config: ModelConfig) -> None:
        site = sites_of(config)[case.site]
        self.case, self.site, self.slots, self.ranks = case, site, case.slots, case.ranks
        self.starts, slices, ranks = site.slice_starts, len(site.slices), case.ranks
        pages = [rank // 8 for rank in ranks]
        per_set = case.weight_bytes(site, plan.dtype.itemsize)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=plan.dtype, device=device.torch)

        # The change is as large as y: smaller, it would drown in y's own rounding.
        self.sets = [
            (
                normal(sum(pages), slices, 8, site.in_).mul_(site.in_**-0.5),
                normal(sum(pages), 8, site.out).mul_(min(ranks) ** -0.5),
            )
            for _ in range(sets_of(per_set, plan.cold))
        ]
        self.x, self.y = normal(case.batch, site.in_), normal(case.batch, site.out)
        self._fresh = self.y.clone()
        self.table = table_of(pages, device)
        tiles = mk.make_tiles(self.slots, mk.DECODE_TILE)
        self.tiles = mk.Tiles(*(t.to(device.torch) for t in tiles))
        traffic = case.batch * (site.in_ + 2 * site.out) * plan.dtype.itemsize
        self.adapter_bytes, self.bytes = per_set, per_set + traffic

    def reset(self) -> None:
        """Takes back what calls have added to y: beside much of it, a right change looks wrong."""
        self.y.copy_(self._fresh)

    def predicted_us(self, card: gpu_model.Card) -> float:
        """Of shrink and expand, one after the other, in a graph."""
        rows = sum(self.ranks[slot] for slot in self.slots)
        width = self.site.in_, self.site.out
        found = gpu_model.lora(self.site.name, width, len(self.slots), self.ranks, rows)
        return sum(kernel.in_step_us(card) for kernel in found)

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
        results = []
        for call in (way, self.looped(self.dense()[:1])[0]):
            self.reset()
            results.append(call().float() - self._fresh.float())
        self.reset()
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


def measure(problem: Problem, repeat: int, bench: Bench) -> None:
    """Times a case in all ways; a result that is wrong is an error, not a number."""
    case = bench.clock.case = problem.case
    own_error = problem.error_of(problem.ours()[0])
    if not own_error <= TOLERANCE:
        bench.report.fail(f"{case}: ours differs from the loop by {own_error:.2%}")
        return
    found: dict[str, object] = {}
    us: dict[str, float] = {}
    for name, steps in ways(problem).items():
        try:
            wrong = problem.error_of(steps[0])
            if not wrong <= TOLERANCE:
                raise ArithmeticError(f"differs from the loop by {wrong:.2%}")
            times = bench.clock.of_graph(steps, repeat)
        except Exception as error:  # of another project; ours was checked
            found[name] = f"{type(error).__name__}: {error}"
            continue
        us[name] = times[0] * 1e6
        found[name] = {
            "microseconds": [round(t * 1e6, 3) for t in times],
            "gigabytes_per_second": round(problem.bytes / times[0] / 1e9, 2),
            "percent_of_copy": round(100 * problem.bytes / times[0] / bench.copy, 1),
        }
    problem.reset()
    if "ours" not in us:
        bench.report.fail(f"{case}: {found['ours']}")
        return
    ours, predicted = us.pop("ours"), problem.predicted_us(bench.card)
    beside = bench.judge.beside(str(case), ours, predicted, comparators=us)
    sizes = {"adapter_bytes": problem.adapter_bytes, "bytes": problem.bytes}
    sizes |= {"sets": len(problem.sets), "error": own_error}
    bench.report.add(kind="lora", **vars(case), **sizes, **found, **beside)


def one(case: Case, plan: Plan, config: ModelConfig, bench: Bench) -> None:
    measure(Problem(case, plan, bench.device, config), plan.repeat, bench)


def main() -> int:
    args, device, report = parse(__doc__ or "")
    config, plan = (
        SHAPES["llama-3.1-8b"],
        Plan(torch.bfloat16, BATCHES, 30, EVICT * l2_bytes(device)),
    )
    shapes = [Attention(32, 4096, 1), Attention(1, 8192, 1), Attention(64, 1024, 1)]
    shapes.append(Attention(1, 8192, 2048))
    if args.rehearse:
        from tests.harness.model_folders import TINY

        config, plan = TINY, Plan(torch.bfloat16, (1, 4), 2, 1)
        shapes = [Attention(2, 32, 1, 4, 2, 16), Attention(1, 64, 16, 4, 2, 16)]
    torch.manual_seed(0)
    bench = open_bench(args, device, report)
    report.content["vllm"], report.content["sglang"] = gpu_vllm.state(), gpu_sglang.state()
    with torch.inference_mode():
        for shape in shapes:
            bench.run(shape, partial(attend, shape, plan.dtype, plan.repeat, bench))
        for case in cases(plan.batches):
            if report.seconds_left < 5 and not args.rehearse:
                report.leave_out(case)
                continue
            bench.run(case, partial(one, case, plan, config, bench))
    say(bench.close(f"copy {bench.copy / 1e9:.0f} GB/s, {len(report.content['results'])} cases"))
    return report.status


if __name__ == "__main__":
    sys.exit(main())
