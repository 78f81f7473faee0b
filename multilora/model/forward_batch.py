"""What the layers see of a step: tokens, positions, pages and adapters, as tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

import multilora_kernels as mk

from ..adapters.output_scales import ScaleRows
from ..adapters.rank_pages import RankPagePool
from ..adapters.weight_changes import NormChanges, RowChanges
from ..device.cpu import Side


@dataclass(frozen=True, slots=True)
class SiteLora:
    """The adapters of a step at one site."""

    pool: RankPagePool
    table: mk.Table
    scales: ScaleRows  # what they do beside their deltas, layer by layer
    tiles: mk.Tiles
    slice_starts: tuple[int, ...]
    rows: RowChanges | None = None  # what they change in single rows of the embedding or head


@dataclass(frozen=True, slots=True)
class NormRows:
    """The norms that the adapters of a step trained."""

    changes: NormChanges
    rows: Tensor  # int32 [tokens], -1 = the base's

    def of(self, index: int) -> tuple[Tensor, Tensor]:
        """What `rms_norm` takes for one norm, by its place in `norm_paths`."""
        return self.changes.layer(index), self.rows


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
    token_slots: Tensor | None = None  # int32 [tokens], the adapter slot of each; None = not sent
    norms: NormRows | None = None  # of tokens with norms of their own; None = there are none
    batch_invariant: bool = False  # a row's bits depend on that row alone; on a CPU always
    side: Side | None = None  # where to shrink beside the base's own work; None = after it
