"""What the layers see of a step: tokens, positions, pages and adapters, as tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

import multilora_kernels as mk

from ..adapters.rank_pages import RankPagePool
from ..device.cpu import Side


@dataclass(frozen=True, slots=True)
class SiteLora:
    """The adapters of a step at one site."""

    pool: RankPagePool
    table: mk.Table
    tiles: mk.Tiles
    slice_starts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """One step. Rows may be padded with tokens that are stored nowhere.

    Without the C++ GEMM they are, to a multiple of 16: torch's GEMMs choose other kernels for other
    small row counts, and a row's bits must not depend on its neighbours.
    """

    ids: Tensor  # int64 [tokens]
    positions: Tensor  # int64 [tokens]
    kv_slots: Tensor  # int64 [tokens], block * block_size + offset; -1 = padding
    query_starts: Tensor  # int32 [seqs + 1]
    seq_lens: Tensor  # int32 [seqs], tokens in the cache after this step
    block_table: Tensor  # int32 [seqs, max_blocks]
    max_query_len: int
    max_seq_len: int
    logits_rows: Tensor | None  # int64 [rows], tokens whose logits are wanted; None = of all
    lora: Mapping[str, SiteLora]  # by site; only sites that some row of the step adapts
    batch_invariant: bool = False  # a row's bits depend on that row alone; on a CPU always
    side: Side | None = None  # where to shrink beside the base's own work; None = after it

    def adapt(self, site: str, layer: int, x: Tensor, base: Callable[[], Tensor]) -> Tensor:
        """`base()` [tokens, out] and every row's own delta of x [tokens, in] at a site."""
        lora = self.lora.get(site)
        if lora is None:
            return base()
        a, b = lora.pool.layer(layer)
        if self.side is None:
            y = base()
            mk.lora_(y, x, a, b, lora.table, lora.tiles, lora.slice_starts)
            return y
        with self.side.fork():
            planes = mk.lora_shrink(x, a, lora.table, lora.tiles, mk.lora_splits(x, a))
        y = base()
        self.side.join()
        mk.lora_expand_(y, planes, b, lora.table, lora.tiles, lora.slice_starts)
        return y

    def add_embed_lora_(self, y: Tensor) -> None:
        """Adds every row's own embedding delta: y [tokens, hidden] in place."""
        lora = self.lora.get("embed")
        if lora is not None:
            a, b = lora.pool.layer(0)
            mk.lora_embed_(y, self.ids, a, b, lora.table, lora.tiles)
