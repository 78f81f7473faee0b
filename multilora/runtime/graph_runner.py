"""Decode steps captured once and replayed: one launch for a whole model instead of hundreds.

A graph has fixed sizes. On a GPU they are captured beforehand, and a step takes the smallest graph
that holds it; on a CPU a size is captured when it comes for the second time, so that no row is
padding. Other steps run uncaptured. What changes from step to step lies in fixed buffers, the real
counts of tiles among it. Steps without an adapter have graphs of their own, in which LoRA costs
nothing.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

import multilora_kernels as mk

from ..device.cpu import Device, Replay
from .step_inputs import ROWS, Extent, StepInputs

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


Work = Callable[[frozenset[str], Tensor], Tensor]
"""A step that adapts these sites, as a function of its block table: logits [tokens, vocab]."""


class Graphs:
    """The captured decode steps of a runner."""

    def __init__(
        self,
        device: Device,
        sites: Iterable[str],  # that graphs with LoRA may adapt
        has_pages: Callable[[str], bool],  # whether a site's rank pages have their place by now
        block_table: Tensor,  # int32 [most sequences, max_blocks]
        max_seq_len: int,
    ) -> None:
        self.sites = frozenset(sites)
        self._device, self._has_pages = device, has_pages
        self._block_table, self._max_seq_len = block_table, max_seq_len
        self._graphs: dict[tuple[Extent, frozenset[str]], Replay] = {}
        self._beforehand: list[Extent] = []  # the smallest first
        self._came: set[tuple[Extent, frozenset[str]]] = set()  # on demand: to capture next time

    def __len__(self) -> int:
        return len(self._graphs)

    def capture(self, sizes: Iterable[Extent], work: Callable[[Extent], Work]) -> None:
        """Captures `work(extent)` for each extent. Says how long it took."""
        start, before = time.perf_counter(), self._device.memory()
        for extent in sizes:
            self._capture(extent, self._adapted(extent), work(extent))
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
            tokens, tiles = need.tokens, need.tokens if need.tiles else 0
            if tokens > len(self._block_table):
                return None
            return Extent(tokens, tokens, tokens, tiles, 0, 1, self._max_seq_len)
        for has in self._beforehand:
            adapts = (has.tiles > 0) == (need.tiles > 0)
            if adapts and has.tokens >= need.tokens and has.tiles >= need.tiles:
                return has
        return None

    def run(self, extent: Extent, sent: Mapping[str, Tensor], work: Work) -> Tensor:
        """What `work` gives, for a step whose fields were sent with the extent."""
        table, sites = sent["block_table"], self._adapted(extent)
        self._block_table[: table.shape[0], : table.shape[1]].copy_(table)
        key = extent, sites
        graph = self._graphs.get(key)
        if graph is not None:
            graph.replay()
            return graph.output
        if key in self._came:
            return self._capture(extent, sites, work).output
        self._came.add(key)
        return work(sites, self._block_table[: extent.seqs])

    def _adapted(self, extent: Extent) -> frozenset[str]:
        return frozenset(filter(self._has_pages, self.sites)) if extent.tiles else frozenset()

    def _capture(self, extent: Extent, sites: frozenset[str], work: Work) -> Replay:
        table = self._block_table[: extent.seqs]
        graph = self._device.capture(lambda: work(sites, table))
        self._graphs[extent, sites] = graph
        return graph


def empty_block_table(seqs: int, max_blocks: int, device: Device) -> Tensor:
    """The block table that graphs of up to `seqs` sequences read."""
    return torch.zeros(seqs, max_blocks, dtype=torch.int32, device=device.torch)
