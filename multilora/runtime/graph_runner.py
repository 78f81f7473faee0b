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
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

import multilora_kernels as mk

from ..adapters.rank_pages import AdapterTable, RankPagePool
from ..device.cpu import CapturedGraph, Device
from .step_inputs import ROWS, BatchShape, StepInputs, StepTensors

logger = logging.getLogger(__name__)

MAX_ON_DEMAND_TOKENS = 64
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


def batch_shapes(max_seqs: int, max_loras: int, max_seq_len: int) -> list[BatchShape]:
    """All sizes to capture, the largest first, so that smaller graphs find memory in their pool."""
    return [
        BatchShape(tokens, tokens, tokens, tiles, 0, 1, max_seq_len)
        for tokens in reversed(token_sizes(max_seqs))
        for tiles in (0, *tile_sizes(tokens, max_loras))
    ]


Work = Callable[[frozenset[str], Tensor], Tensor]
"""A step that adapts these sites, as a function of its block table: logits [tokens, vocab]."""


class _Key(NamedTuple):
    """What a graph is of."""

    shape: BatchShape
    adapted: frozenset[str]  # sites with rank pages
    scaled: frozenset[str]  # those of them with DoRA's scales or biases, too
    has_norms: bool  # whether adapters may have norms of their own


class GraphRunner:
    """The captured decode steps of a runner."""

    def __init__(
        self,
        device: Device,
        sites: Iterable[str],  # that graphs with LoRA may adapt
        pool: Callable[[str], RankPagePool],  # of a site; its pages may not have their place yet
        table: AdapterTable,  # what else slots have, which may not have its place either
        block_table: Tensor,  # int32 [most sequences, max_blocks]
        max_seq_len: int,
        logits: Tensor | None = None,  # [most tokens, vocab] that all write to; None: own ones
    ) -> None:
        self.sites = frozenset(sites)
        self._device, self._pool, self._table = device, pool, table
        self._block_table, self._max_seq_len, self._logits = block_table, max_seq_len, logits
        self._graphs: dict[_Key, CapturedGraph] = {}
        self._beforehand: list[BatchShape] = []  # the smallest first
        self._came: set[_Key] = set()  # on demand: to capture next time

    def __len__(self) -> int:
        return len(self._graphs)

    def capture(
        self, sizes: Iterable[BatchShape], work: Callable[[BatchShape], Work], expected_bytes: int
    ) -> None:
        """Captures `work(shape)` for each shape. Says what it took, beside what was expected."""
        start, before = time.perf_counter(), self._device.memory()
        for shape in sizes:
            self._capture(self._key(shape), work(shape))
            self._beforehand.append(shape)
        self._beforehand.sort(key=lambda shape: (shape.tokens, shape.tiles))
        self._device.synchronize()
        after = self._device.memory()
        taken = 0 if self._logits is None else self._logits.nbytes  # which was there before
        taken += before.free - after.free if before is not None and after is not None else 0
        logger.info(
            "captured %d decode graphs of up to %d tokens in %.1f s and %.2f GB, of %.2f expected",
            len(self._graphs),
            self._beforehand[-1].tokens,
            time.perf_counter() - start,
            taken / 1e9,
            expected_bytes / 1e9,
        )

    def shape_for(self, step: StepInputs) -> BatchShape | None:
        """The sizes to send a step with, or None if it runs uncaptured.

        That is one with prompts, with an adapted embedding or head, or one that is too large.
        """
        need = step.shape
        if need.max_query_len > 1 or not step.gives_all_logits or not step.sites <= self.sites:
            return None
        if self._device.captures_on_demand:
            tokens, tiles = need.tokens, need.tokens if need.tiles else 0
            if tokens > len(self._block_table):
                return None
            return BatchShape(tokens, tokens, tokens, tiles, 0, 1, self._max_seq_len)
        for has in self._beforehand:
            adapts = (has.tiles > 0) == (need.tiles > 0)
            if adapts and has.tokens >= need.tokens and has.tiles >= need.tiles:
                return has
        return None

    def run(self, shape: BatchShape, sent: StepTensors, work: Work) -> Tensor:
        """What `work` gives, for a step that was sent with the shape."""
        table, key = sent.block_table, self._key(shape)
        self._block_table[: table.shape[0], : table.shape[1]].copy_(table)
        graph = self._graphs.get(key)
        if graph is not None:
            graph.replay()
            return graph.output
        if key in self._came:
            return self._capture(key, work).output
        self._came.add(key)
        return work(key.adapted, self._block_table[: shape.seqs])

    def _key(self, shape: BatchShape) -> _Key:
        if not shape.tiles:
            return _Key(shape, frozenset(), frozenset(), has_norms=False)
        adapted = frozenset(name for name in self.sites if self._pool(name).is_allocated)
        scales = self._table.scales
        scaled = frozenset(name for name in adapted if scales[name].is_allocated)
        return _Key(shape, adapted, scaled, self._table.norms.is_allocated)

    def _capture(self, key: _Key, work: Work) -> CapturedGraph:
        table = self._block_table[: key.shape.seqs]

        def logits() -> Tensor:
            found = work(key.adapted, table)
            return found if self._logits is None else self._logits[: len(found)].copy_(found)

        graph = self._graphs[key] = self._device.capture(logits)
        return graph


def empty_block_table(seqs: int, max_blocks: int, device: Device) -> Tensor:
    """The block table that graphs of up to `seqs` sequences read."""
    return torch.zeros(seqs, max_blocks, dtype=torch.int32, device=device.torch)
