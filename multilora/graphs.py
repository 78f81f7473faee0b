"""Decode steps captured once and replayed: one launch for a whole model instead of hundreds.

A graph has fixed sizes; a step takes the smallest graph that holds it, and one that none holds runs
uncaptured. What changes from step to step lies in fixed buffers, the real counts of tiles among it.
Steps without an adapter have graphs of their own, in which LoRA costs nothing.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

import multilora_kernels as mk

from .device import Device, Replay
from .inputs import ROWS, Extent, StepInputs
from .layers import Rope

logger = logging.getLogger(__name__)


ON_DEMAND_TOKENS = 64
"""Most tokens of a graph on a CPU: beyond, what Python takes is nothing beside the work."""


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
    """The captured decode steps of a runner.

    `sites` are those that graphs with LoRA may adapt. Graphs of a GPU are captured beforehand. A
    CPU captures a size when it comes for the second time: no row is padding.
    """

    def __init__(self, device: Device, sites: Iterable[str], block_table: Tensor) -> None:
        self.sites = frozenset(sites)
        self._device = device
        self._block_table = block_table  # int32 [most sequences, max_blocks]
        self._graphs: dict[tuple[Extent, frozenset[str]], Replay] = {}
        self._beforehand: list[Extent] = []  # the smallest first
        self._came: set[tuple[Extent, frozenset[str]]] = set()  # those to capture next time
        self._length = 0  # max_seq_len of the graphs captured on demand

    def __len__(self) -> int:
        return len(self._graphs)

    def capture(
        self, sizes: Iterable[Extent], work: Callable[[Extent], Callable[[Tensor], Tensor]]
    ) -> None:
        """Captures `work(extent)(block_table)` for each extent. Says how long it took."""
        start, before = time.perf_counter(), self._device.memory()
        for extent in sizes:
            self._capture(extent, self.sites if extent.tiles else frozenset(), work(extent))
            self._beforehand.append(extent)
        self._beforehand.sort(key=lambda extent: (extent.tokens, extent.tiles))
        self._device.synchronize()
        after = self._device.memory()
        taken = before.free - after.free if before is not None and after is not None else 0
        logger.info(
            "captured %d decode graphs of up to %d tokens in %.1f s and %.2f GB",
            len(self._graphs),
            self._beforehand[-1].tokens,
            time.perf_counter() - start,
            taken / 1e9,
        )

    def extent_for(self, step: StepInputs) -> Extent | None:
        """The sizes to send a step with, or None if it runs uncaptured.

        That is one with prompts, with an adapted embedding or head, or one that is too large.
        """
        need = step.extent
        if need.max_query_len > 1 or not step.gives_all_logits or not step.sites <= self.sites:
            return None
        if self._device.captures_on_demand:
            return self._own_extent(need) if need.tokens <= len(self._block_table) else None
        for has in self._beforehand:
            adapts = (has.tiles > 0) == (need.tiles > 0)
            if adapts and has.tokens >= need.tokens and has.tiles >= need.tiles:
                return has
        return None

    def _own_extent(self, need: Extent) -> Extent:
        if need.max_seq_len > self._length:  # tables of positions move when they grow
            self._graphs.clear()
            self._came.clear()
            self._length = -(-need.max_seq_len // Rope.STEP) * Rope.STEP
        tiles = need.tokens if need.tiles else 0
        return Extent(need.tokens, need.seqs, need.logits, tiles, 0, 1, self._length)

    def run(
        self,
        extent: Extent,
        sites: frozenset[str],
        sent: Mapping[str, Tensor],
        work: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """`work(block_table)`, the logits of a step whose fields were sent with the extent."""
        table, key = sent["block_table"], (extent, sites)
        self._block_table[: table.shape[0], : table.shape[1]].copy_(table)
        if key in self._graphs:
            self._graphs[key].replay()
        elif key in self._came:
            self._capture(extent, sites, work)
        else:
            self._came.add(key)
            return work(self._block_table[: extent.seqs])
        return self._graphs[key].output

    def _capture(
        self, extent: Extent, sites: frozenset[str], work: Callable[[Tensor], Tensor]
    ) -> None:
        block_table = self._block_table[: extent.seqs]
        self._graphs[extent, sites] = self._device.capture(lambda: work(block_table))


def empty_block_table(seqs: int, max_blocks: int, device: Device) -> Tensor:
    """The block table that graphs of up to `seqs` sequences read."""
    return torch.zeros(seqs, max_blocks, dtype=torch.int32, device=device.torch)
