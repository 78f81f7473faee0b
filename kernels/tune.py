"""`python -m multilora_kernels.tune`: times launch parameters on this GPU and rewrites its table.

For every shape of Llama 3.1 8B and 70B and several batches of distinct adapters it times each
candidate in a CUDA graph that rotates over cold weights. The arithmetic part is the one with the
least total time over the token buckets, each with its own best schedule; see `plans` for why tokens
may not choose it. Shapes not named on the command line keep their entries.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import plans
from .plans import Device, Plans
from .tiles import Table, Tiles, make_tiles

logger = logging.getLogger(__name__)

BUCKETS = (16, 64, 256)
"""Tokens of the buckets that are decode steps of distinct adapters; ANY is a prefill step."""
PREFILL_TOKENS = 2048
RANK, COPIES = 16, 32

Options = Mapping[str, Sequence[int]]


class Space(NamedTuple):
    """The candidates of an op: every combination of its options."""

    arithmetic: Options
    decode: Options
    prefill: Options


SPACES = {
    "lora_shrink": Space(
        {"block_k": [64], "split_k": [2, 4, 8, 16]},
        {
            "block_m": [16],
            "block_pages": [2, 4, 8],
            "column_programs": [1, 2],
            "num_warps": [4],
            "num_stages": [3, 5],
        },
        {
            "block_m": [16, 32],
            "block_pages": [4, 8],
            "column_programs": [1],
            "num_warps": [4],
            "num_stages": [3, 4],
        },
    ),
    "lora_expand": Space(
        {"block_pages": [2]},
        {
            "block_m": [16],
            "block_n": [128, 256],
            "programs_per_sm": [2, 4, 6],
            "num_warps": [4, 8],
            "num_stages": [1],
        },
        {
            "block_m": [32],
            "block_n": [64, 128],
            "programs_per_sm": [2, 3, 4],
            "num_warps": [4, 8],
            "num_stages": [1, 2],
        },
    ),
}
# in or out, slices
SHAPES = {
    "lora_shrink": [(4096, 3), (4096, 1), (4096, 2), (14336, 1), (8192, 3), (8192, 1), (28672, 1)],
    "lora_expand": [(6144, 3), (4096, 1), (28672, 2), (10240, 3), (8192, 1), (57344, 2)],
}

# Seconds of one launch with a plan: (op, shape, tokens, plan) -> s; inf if it cannot be launched.
Timer = Callable[[str, tuple[int, int], int, plans.Plan], float]


def candidates(options: Options) -> Iterator[dict[str, int]]:
    for values in itertools.product(*options.values()):
        yield dict(zip(options, values, strict=True))


def one_family(schedule: Mapping[str, int]) -> bool:
    """Whether tiles of this schedule keep to mma.sync, as `lora` promises: see its docstring."""
    return schedule["block_m"] < 64 or schedule["num_warps"] < 4


def tune(op: str, shape: tuple[int, int], time: Timer) -> dict[str, Any]:
    """The best table entry of one op and shape."""
    space, best, least = SPACES[op], None, float("inf")
    for arithmetic in candidates(space.arithmetic):
        entry: dict[str, Any] = {"arithmetic": arithmetic, "schedule": {}}
        total = 0.0
        for bucket in (*map(str, BUCKETS), plans.ANY):
            tokens = PREFILL_TOKENS if bucket == plans.ANY else int(bucket)
            options = space.prefill if bucket == plans.ANY else space.decode
            timed = [
                (time(op, shape, tokens, {**arithmetic, **schedule}), n, schedule)
                for n, schedule in enumerate(candidates(options))
                if one_family(schedule)
            ]
            seconds, _, entry["schedule"][bucket] = min(timed)
            total += seconds / tokens**0.5  # no bucket may be drowned by the larger ones
        logger.info("%s %s %s: score %.3g", op, plans.name_of(shape), arithmetic, total)
        if total < least:
            best, least = entry, total
    if best is None:
        raise RuntimeError(f"no candidate of {op} {shape} can be launched")
    return best


def retune(table: Plans, shapes: Mapping[str, Sequence[tuple[int, int]]], time: Timer) -> Plans:
    """A table with new entries for `shapes`, and the others as they were."""
    ops = {op: dict(entries) for op, entries in table.ops.items()}
    for op, wanted in shapes.items():
        for shape in wanted:
            ops[op][plans.name_of(shape)] = tune(op, shape, time)
    return Plans(ops)


def write(table: Plans, path: Path) -> None:
    path.write_text(json.dumps(table.ops, indent=1) + "\n", encoding="utf-8")


class Workload(NamedTuple):
    """Tensors of one op and shape; weights of COPIES layers, so that none is still in L2."""

    rows: Tensor  # x or y
    weights: list[Tensor]
    planes: Tensor
    table: Table
    tiles: Tiles


def make_workload(op: str, shape: tuple[int, int], tokens: int, where: torch.device) -> Workload:
    """Decode: as many adapters as tokens. Prefill: four prompts of four adapters."""
    width, slices = shape
    decode = tokens <= max(BUCKETS)
    adapters = tokens if decode else 4
    each = tokens // adapters
    tiles = make_tiles([t // each for t in range(tokens)], 16 if decode else 64)
    pages = RANK // 8
    ids = torch.arange(adapters * pages, dtype=torch.int32).view(adapters, pages)
    counts = torch.full((adapters,), pages, dtype=torch.int32)
    table = Table(ids.to(where), torch.ones(adapters, pages, device=where), counts.to(where))
    inner = (slices, 8, width) if op == "lora_shrink" else (8, width)
    weights = [
        torch.randn(adapters * pages, *inner, device=where, dtype=torch.bfloat16)
        for _ in range(COPIES if decode else 2)
    ]
    rows = torch.randn(tokens, width, device=where, dtype=torch.bfloat16)
    planes = torch.randn(8, tokens, slices * pages * 8, device=where)
    return Workload(rows, weights, planes, table, Tiles(*(t.to(where) for t in tiles)))


def calls(
    op: str, shape: tuple[int, int], work: Workload, plan: plans.Plan, num_sms: int
) -> list[Callable[[], object]]:
    """One call for each copy of the weights, under this plan."""
    from . import lora  # triton

    entry = {"arithmetic": plan, "schedule": {plans.ANY: {}}}
    device = Device(0, num_sms, Plans({op: {plans.ANY: entry}}))
    if op == "lora_shrink":
        split_k = plan["split_k"]
        return [
            partial(lora.lora_shrink, work.rows, a, work.table, work.tiles, split_k, device)
            for a in work.weights
        ]
    width, slices = shape
    each = width // slices // 128 * 128  # slices of one width stand for q, k, v as well
    starts = (*range(0, each * slices, each), width)
    rest = (work.table, work.tiles, starts, device)
    return [partial(lora.lora_expand_, work.rows, work.planes, b, *rest) for b in work.weights]


def gpu_timer(where: torch.device) -> Timer:
    """Times one launch by replaying a CUDA graph of all copies; workloads are kept for reuse."""
    from triton.runtime.errors import OutOfResources

    num_sms = torch.cuda.get_device_properties(where).multi_processor_count
    last: dict[tuple[str, tuple[int, int], int], Workload] = {}

    def time(op: str, shape: tuple[int, int], tokens: int, plan: plans.Plan) -> float:
        key = (op, shape, tokens)
        if key not in last:
            last.clear()
            last[key] = make_workload(*key, where)
        launches = calls(op, shape, last[key], plan, num_sms)
        try:
            launches[0]()
        except OutOfResources:
            return float("inf")
        torch.cuda.synchronize(where)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for launch in launches:
                launch()
        return min(_seconds(graph) for _ in range(5)) / len(launches)

    return time


def _seconds(graph: torch.cuda.CUDAGraph) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="multilora_kernels.tune", description=__doc__)
    parser.add_argument("--op", choices=SPACES, action="append", help="default: all")
    parser.add_argument(
        "--shape", action="append", help="width x slices, e.g. 4096x3; default: Llama 3.1's"
    )
    parser.add_argument("--output", type=Path, help="default: the table of this GPU")
    chosen = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("no CUDA device: a table is tuned where it is used")
    where = torch.device("cuda", torch.cuda.current_device())
    device = plans.device_of(where)
    shapes = {op: SHAPES[op] for op in chosen.op or SPACES}
    if chosen.shape:
        own = [(int(a), int(b)) for a, _, b in (s.partition("x") for s in chosen.shape)]
        shapes = dict.fromkeys(shapes, own)
    table = retune(device.plans, shapes, gpu_timer(where))
    write(table, chosen.output or plans.path_of(device.sm))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main()
