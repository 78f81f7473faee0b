"""Changes to norms, embeddings and heads: what is packed, and what a slot then adds."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from multilora.adapters.peft.reader import TokenRows
from multilora.adapters.weight_changes import (
    NormChanges,
    PackedRows,
    RowChanges,
    most_rows,
    pack_norms,
    pack_rows,
    weighted_rows,
)
from multilora.config.lora_sites import Site, Slice
from multilora.errors import AdapterInvalid
from tests.harness.small_stores import make_adapter

HIDDEN, VOCAB = 4, 12
EMBED = Site("embed", "", (Slice("embed_tokens", HIDDEN),), VOCAB, 1)
HEAD = Site("lm_head", "", (Slice("lm_head", VOCAB),), HIDDEN, 1)


class Base:
    """Random weights."""

    def __init__(self) -> None:
        self.rows = {name: torch.randn(VOCAB, HIDDEN) for name in ("embed", "lm_head")}
        self.norms = torch.rand(5, HIDDEN).bfloat16()

    def token_rows(self, site: str, ids: Tensor) -> Tensor:
        return self.rows[site][ids]

    def norm_weight(self, index: int) -> Tensor:
        return self.norms[index]


def packed(*ids: int) -> PackedRows:
    return PackedRows(torch.tensor(ids), torch.randn(len(ids), HIDDEN))


def row_changes(site: Site, rows: int = 5) -> RowChanges:
    return RowChanges(site, 3, HIDDEN, rows, dtype=torch.float32)


def test_a_row_is_packed_as_its_difference_to_the_served_one() -> None:
    base, ids, values = Base(), torch.tensor([7, 2]), torch.randn(2, HIDDEN).bfloat16()
    found = pack_rows(TokenRows(ids, values), "lm_head", torch.float32, base)
    assert torch.equal(found.ids, ids)
    torch.testing.assert_close(base.rows["lm_head"][ids] + found.change, values.float())
    with pytest.raises(AdapterInvalid, match=r"row of lm_head overflows torch\.float16"):
        pack_rows(TokenRows(ids, values * 1e6), "lm_head", torch.float16, base)


def test_norms_are_packed_as_their_differences() -> None:
    base, own = Base(), torch.rand(2, HIDDEN)
    assert pack_norms(make_adapter("d"), 5, base) is None
    adapter = dataclasses.replace(make_adapter("d"), norms={4: own[0], 1: own[1]})
    found = pack_norms(adapter, 5, base)
    assert found is not None
    assert not found[[0, 2, 3]].any()
    torch.testing.assert_close(found[4] + base.norms[4].float(), own[0])
    torch.testing.assert_close(found[1] + base.norms[1].float(), own[1])


def test_norms_of_slots() -> None:
    norms = NormChanges(5, 3, HIDDEN)
    assert not norms.is_allocated
    norms.clear(1)
    a, b = torch.randn(2, 5, HIDDEN)
    norms.write(2, [(a, 1.0)])
    norms.write(0, [(a, 0.5), (b, -2.0)])
    assert norms.is_allocated
    assert norms.capacity_bytes == 4 * 5 * 3 * HIDDEN
    assert [norms.has_row(slot) for slot in range(3)] == [True, False, True]
    slots = torch.tensor([-1, 2, 1, 0], dtype=torch.int32)
    assert norms.rows_of(slots).tolist() == [-1, 2, -1, 0]
    torch.testing.assert_close(norms.layer(3)[2], a[3])
    torch.testing.assert_close(norms.layer(3)[0], 0.5 * a[3] - 2 * b[3])
    norms.write(2, [(b, 1.0)])
    torch.testing.assert_close(norms.layer(0)[2], b[0])
    norms.clear(2)
    assert norms.rows_of(slots).tolist() == [-1, -1, -1, 0]


def test_rows_of_the_embedding() -> None:
    rows = row_changes(EMBED)
    assert not rows.is_allocated
    rows.clear(0)
    a, b = packed(3, 0), packed(11, 3, 5)
    rows.write(1, [(a, 1.0)])
    rows.write(2, [(a, 0.5), (b, -2.0)])
    assert [rows.has_row(slot) for slot in range(3)] == [False, True, True]
    ids = torch.tensor([3, 0, 5, 3, 3, 11, 4])
    slots = torch.tensor([1, 1, 1, 2, -1, 2, 2], dtype=torch.int32)
    y = torch.randn(7, HIDDEN)
    want = y.clone()
    want[0] += a.change[0]
    want[1] += a.change[1]
    want[3] += 0.5 * a.change[0] - 2 * b.change[1]
    want[5] += -2 * b.change[0]
    rows.add_(y, ids, slots)
    torch.testing.assert_close(y, want)
    rows.clear(1)
    before = y.clone()
    rows.add_(y[:3], ids[:3], slots[:3])
    assert torch.equal(y, before)
    rows.write(1, [(b, 1.0)])  # nothing is left of what was there before
    rows.add_(y[:3], ids[:3], slots[:3])
    torch.testing.assert_close(
        y[:3] - before[:3], b.change[[1, 0, 2]] * torch.tensor([[1], [0], [1]])
    )


def test_rows_of_the_head_are_columns() -> None:
    rows, a = row_changes(HEAD), packed(9, 2)
    rows.write(1, [(a, -1.5)])
    columns = rows.columns
    assert columns.column_ids.shape == (3, 8)  # as many as are computed at once
    assert columns.num_columns.tolist() == [0, 2, 0]
    assert columns.column_ids[1, :2].tolist() == [2, 9]
    torch.testing.assert_close(columns.weights[1, :2], -1.5 * a.change[[1, 0]])
    rows.clear(1)
    assert columns.num_columns.tolist() == [0, 0, 0]


def test_weighted_rows_in_a_fixed_order() -> None:
    a, b = packed(5, 1), packed(1)
    ids, sums = weighted_rows([(a, 2.0), (b, 3.0)], HIDDEN)
    assert ids.tolist() == [1, 5]
    torch.testing.assert_close(
        sums, torch.stack([2 * a.change[1] + 3 * b.change[0], 2 * a.change[0]])
    )


def test_most_rows_counts_a_token_once() -> None:
    assert most_rows({}) == 0
    assert most_rows({"embed": [packed(1, 2), packed(2, 3)], "lm_head": [packed(1, 2)]}) == 3
