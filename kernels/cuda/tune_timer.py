"""What `tune` times: LoRA launches over cold weights, as decode steps and prompts have them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..tiles import DECODE_TILE, PREFILL_TILE, Table, Tiles, make_tiles
from . import launch_plans
from .launch_plans import CudaTarget, LaunchPlans


class Load(NamedTuple):
    """A batch: tokens in runs of one length for each adapter."""

    tokens: int
    adapters: int
    planes: int  # that shrink leaves and expand sums


class Scale(NamedTuple):
    """How much is measured."""

    buckets: tuple[int, ...] = (16, 64, 256)  # tokens of decode steps
    prefill: int = 2048  # tokens of four prompts, which stand for every larger step
    rank: int = 16
    copies: int = 32  # of the weights in a graph, as of layers
    most_bytes: int = 1 << 30  # of them
    evicted: int = 256 << 20  # bytes read before a graph runs: more than any L2 cache
    repeat: int = 5

    def loads(self, bucket: str, planes: Sequence[int]) -> list[Load]:
        """The batches of a bucket: as many adapters as tokens, and one for all."""
        if bucket == launch_plans.ANY:
            return [Load(self.prefill, 4, count) for count in planes]
        tokens = int(bucket)
        return [Load(tokens, adapters, n) for adapters in (tokens, 1) for n in planes]

    def names(self) -> list[str]:
        """The buckets' names."""
        return [*map(str, self.buckets), launch_plans.ANY]


# Seconds of one launch with a plan: (op, shape, load, plan) -> s; inf if it cannot be launched.
Timer = Callable[[str, tuple[int, int], Load, launch_plans.LaunchPlan], float]


class Workload(NamedTuple):
    """Tensors of one op, shape and batch, with weights for each layer."""

    rows: Tensor  # x or y
    weights: list[Tensor]
    planes: Tensor
    table: Table
    tiles: Tiles


def make_workload(
    op: str, shape: tuple[int, int], load: Load, scale: Scale, where: torch.device
) -> Workload:
    """Random tensors; tiles as in a decode step, or as in one with prompts."""
    (width, slices), pages = shape, scale.rank // 8
    tile = DECODE_TILE if load.tokens <= max(scale.buckets) else PREFILL_TILE
    each = load.tokens // load.adapters
    tiles = make_tiles([t // each for t in range(load.tokens)], tile)
    ids = torch.arange(load.adapters * pages, dtype=torch.int32).view(load.adapters, pages)
    counts = torch.full((load.adapters,), pages, dtype=torch.int32)
    table = Table(ids.to(where), torch.ones(ids.shape, device=where), counts.to(where))
    inner = (slices, 8, width) if op == "lora_shrink" else (8, width)
    num_bytes = 2 * ids.numel() * math.prod(inner)
    weights = [
        torch.randn(ids.numel(), *inner, device=where, dtype=torch.bfloat16)
        for _ in range(max(2, min(scale.copies, scale.most_bytes // num_bytes)))
    ]
    rows = torch.randn(load.tokens, width, device=where, dtype=torch.bfloat16)
    planes = torch.randn(load.planes, load.tokens, slices * pages * 8, device=where)
    return Workload(rows, weights, planes, table, Tiles(*(t.to(where) for t in tiles)))


def calls(
    op: str, shape: tuple[int, int], work: Workload, plan: launch_plans.LaunchPlan, num_sms: int
) -> list[Callable[[], object]]:
    """One call for each copy of the weights, under this plan."""
    from . import lora  # triton

    entry = {"arithmetic": plan, "schedule": {launch_plans.ANY: {}}}
    device = CudaTarget(0, num_sms, LaunchPlans({op: {launch_plans.ANY: entry}}))
    if op == "lora_shrink":
        split_k = min(plan["split_k"], -(-shape[0] // plan["block_k"]))
        return [
            partial(lora.lora_shrink, work.rows, a, work.table, work.tiles, split_k, device)
            for a in work.weights
        ]
    width, slices = shape
    # Slices of one width stand for q, k, v as well; whole blocks of columns, if there are any.
    each = width // slices // 128 * 128 or width // slices
    starts = (*range(0, each * slices, each), width)
    rest = (work.table, work.tiles, starts, device)
    return [partial(lora.lora_expand_, work.rows, work.planes, b, *rest) for b in work.weights]


def gpu_timer(where: torch.device, scale: Scale) -> Timer:
    """Times one launch by replaying a CUDA graph over all weights; keeps a shape's workloads."""
    from triton.runtime.errors import OutOfResources

    num_sms = torch.cuda.get_device_properties(where).multi_processor_count
    filler = torch.zeros(scale.evicted // 4, device=where)
    works: dict[Load, Workload] = {}
    current: list[tuple[str, tuple[int, int]]] = []

    def timer(op: str, shape: tuple[int, int], load: Load, plan: launch_plans.LaunchPlan) -> float:
        if current != [(op, shape)]:
            works.clear()
            current[:] = [(op, shape)]
        if load not in works:
            works[load] = make_workload(op, shape, load, scale, where)
        launches = calls(op, shape, works[load], plan, num_sms)
        try:
            launches[0]()
        except OutOfResources:
            return math.inf
        torch.cuda.synchronize(where)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for launch in launches:
                launch()
        return min(_seconds(graph, filler) for _ in range(scale.repeat)) / len(launches)

    return timer


def _seconds(graph: torch.cuda.CUDAGraph, filler: Tensor) -> float:
    filler.sum()  # by reading: what is written now would be written back while we time
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3
