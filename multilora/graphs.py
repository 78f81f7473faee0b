"""Decode steps captured once and replayed: one launch for a whole model instead of hundreds.

A graph has fixed sizes; a step takes the smallest graph that holds it, and one that none holds runs
uncaptured. What changes from step to step lies in fixed buffers, the real counts of tiles among it.
Steps without an adapter have graphs of their own, in which LoRA costs nothing.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

import multilora_kernels as mk

from .device import Device, Replay
from .inputs import ROWS, Extent, StepInputs

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Graph:
    """One captured step."""

    extent: Extent
    work: Replay


def token_sizes(most: int) -> list[int]:
    """The token counts to capture: every 16 up to 64, every 32 to 128, every 64 to 256, ..."""
    sizes, step = [ROWS], ROWS
    while sizes[-1] < most:
        if sizes[-1] >= 4 * step:
            step *= 2
        sizes.append(sizes[-1] + step)
    return sizes


def tile_sizes(tokens: int, max_loras: int) -> list[int]:
    """The tile capacities to capture for so many tokens: a quarter of the worst case, and that.

    Empty tiles cost little, but not nothing: few adapters must not pay for many.
    """
    worst = mk.tile_capacity(tokens, min(tokens, max_loras), mk.DECODE_TILE)
    few = max(-(-tokens // mk.DECODE_TILE) + 1, worst // 4)
    return sorted({min(few, worst), worst})


def extents(max_seqs: int, max_loras: int, max_seq_len: int) -> list[Extent]:
    """All sizes to capture, the largest first, so that smaller graphs find memory in their pool."""
    return [
        Extent(tokens, tokens, tokens, tiles, 0, 1, max_seq_len)
        for tokens in reversed(token_sizes(max_seqs))
        for tiles in (0, *tile_sizes(tokens, max_loras))
    ]


class Graphs:
    """The captured decode steps of a runner."""

    def __init__(self, sites: Iterable[str], block_table: Tensor) -> None:
        self.sites = frozenset(sites)  # that the graphs with LoRA adapt
        self._block_table = block_table  # int32 [largest graph's seqs, max_blocks]
        self._graphs: list[Graph] = []  # the smallest first

    def __len__(self) -> int:
        return len(self._graphs)

    def capture(
        self,
        device: Device,
        sizes: Iterable[Extent],
        work: Callable[[Extent, Tensor], Callable[[], Tensor]],
    ) -> None:
        """Captures `work(extent, block_table)` for each extent. Says how long it took."""
        start, before = time.perf_counter(), device.memory()
        for extent in sizes:
            step = work(extent, self._block_table[: extent.seqs])
            self._graphs.append(Graph(extent, device.capture(step)))
        self._graphs.sort(key=lambda graph: (graph.extent.tokens, graph.extent.tiles))
        device.synchronize()
        after = device.memory()
        taken = before.free - after.free if before is not None and after is not None else 0
        logger.info(
            "captured %d decode graphs of up to %d tokens in %.1f s and %.2f GB",
            len(self._graphs),
            max(graph.extent.tokens for graph in self._graphs),
            time.perf_counter() - start,
            taken / 1e9,
        )

    def find(self, step: StepInputs) -> Graph | None:
        """The smallest graph that holds the step, or None: prompts, or an adapted embedding."""
        need = step.extent
        if need.max_query_len > 1 or need.logits != need.tokens or not step.sites <= self.sites:
            return None
        for graph in self._graphs:
            has = graph.extent
            adapts = (has.tiles > 0) == (need.tiles > 0)
            if adapts and has.tokens >= need.tokens and has.tiles >= need.tiles:
                return graph
        return None

    def replay(self, graph: Graph, sent: Mapping[str, Tensor]) -> Tensor:
        """Logits of a step whose fields were sent with the graph's extent."""
        table = sent["block_table"]
        self._block_table[: table.shape[0], : table.shape[1]].copy_(table)
        graph.work.replay()
        return graph.work.output


def empty_block_table(seqs: int, max_blocks: int, device: Device) -> Tensor:
    """The block table that graphs of up to `seqs` sequences read."""
    return torch.zeros(seqs, max_blocks, dtype=torch.int32, device=device.torch)
