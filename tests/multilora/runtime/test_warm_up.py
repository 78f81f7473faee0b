"""The steps before serving: one of each kind, none larger than a request can make it."""

from __future__ import annotations

from bisect import bisect_left

from hypothesis import given
from hypothesis import strategies as st

from multilora.config.engine import EngineConfig
from multilora.runtime.step_inputs import ROWS
from multilora.runtime.warm_up import warm_up_shapes

bounds = st.sets(st.integers(1, 2000)).map(sorted)


def kinds(counts: set[int], bounds: list[int]) -> set[int]:
    return {bisect_left(bounds, count) for count in counts}


@given(rows=bounds, seqs=bounds, tokens=st.integers(1, 3000), requests=st.integers(1, 3000))
def test_every_kind_of_step_comes(
    rows: list[int], seqs: list[int], tokens: int, requests: int
) -> None:
    config = EngineConfig(model="x", max_num_batched_tokens=tokens, max_num_seqs=requests)
    shapes = warm_up_shapes(config, rows, seqs)
    padded = range(ROWS, tokens + ROWS, ROWS)  # what a step's rows can be
    assert kinds({shape.tokens for shape in shapes}, rows) == kinds(set(padded), rows)
    assert kinds({shape.seqs for shape in shapes}, seqs) == kinds({*range(1, requests + 1)}, seqs)
    assert all(shape.tokens in padded and shape.seqs <= requests for shape in shapes)
    assert all(shape.logits == shape.tokens for shape in shapes)
    assert all(shape.tiles and shape.head_tiles for shape in shapes)
    assert len(shapes) <= 1 + max(len(rows), len(seqs))
