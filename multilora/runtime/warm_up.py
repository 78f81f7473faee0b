"""The steps that launch every variant of a kernel which serving can reach: run before it begins.

On a GPU a variant is compiled at its first launch, and all requests would wait for it. Variants
follow three things of a step: how many rows it has, how many sequences, and which ops it needs. So
one step for each kind of row count and sequence count, with every op in it, launches them all.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING

from .step_inputs import ROWS, BatchShape

if TYPE_CHECKING:
    from ..config.engine import EngineConfig


def warm_up_shapes(
    config: EngineConfig,
    row_bounds: Iterable[int],  # up to which launches are alike, rising
    seq_bounds: Iterable[int],
) -> Sequence[BatchShape]:
    """The smallest step of each kind: its rows are those of one prompt, whose logits are wanted."""
    rows = _smallest(row_bounds, -(-config.max_num_batched_tokens // ROWS) * ROWS)
    seqs = _smallest(seq_bounds, config.max_num_seqs)
    found = []
    for tokens, count in zip_longest(rows, seqs):
        tokens, count = tokens or rows[-1], count or seqs[-1]
        tokens = -(-tokens // ROWS) * ROWS
        found.append(BatchShape(tokens, count, tokens, 1, 1, config.max_num_batched_tokens, 1))
    return found


def _smallest(bounds: Iterable[int], most: int) -> list[int]:
    """The smallest count of each kind that is at most `most`."""
    return [1, *(bound + 1 for bound in bounds if bound < most)]
