"""Whole weights beside an adapter: rows that are the base's, roundings of them, and others."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from multilora.adapters import base_weights
from multilora.adapters.base_weights import changed_rows
from multilora.adapters.peft.reader import TokenRows
from multilora.errors import AdapterInvalid
from tests.harness.small_stores import make_adapter

WEIGHT = torch.randn(12, 4)


def test_one_may_be_a_rounding_of_the_other() -> None:
    for saved, own in ((WEIGHT, WEIGHT), (WEIGHT, WEIGHT.bfloat16()), (WEIGHT.half(), WEIGHT)):
        adapter = dataclasses.replace(make_adapter("d"), weights={"embed": saved})
        assert changed_rows("a", adapter, {"embed": own}, 0) == {}
    assert changed_rows("a", make_adapter("d"), {}, 0) == {}


@pytest.mark.parametrize("rows", [5, 4096])
def test_rows_that_differ_are_the_adapters(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_weights, "ROWS", rows)
    saved = WEIGHT.clone()
    saved[[3, 7], 1] += 1
    adapter = dataclasses.replace(make_adapter("d"), weights={"embed": saved, "lm_head": WEIGHT})
    found = changed_rows("a", adapter, {"embed": WEIGHT.bfloat16(), "lm_head": WEIGHT}, 2)
    assert found.keys() == {"embed"}
    assert found["embed"].ids.tolist() == [3, 7]
    assert torch.equal(found["embed"].values, saved[[3, 7]])
    with pytest.raises(AdapterInvalid, match=r"'a' changes 2 rows of model\.embed_tokens, above"):
        changed_rows("a", adapter, {"embed": WEIGHT, "lm_head": WEIGHT}, 1)


def test_rows_that_were_saved_alone_count_as_well() -> None:
    rows = TokenRows(torch.tensor([5, 2]), torch.ones(2, 4))
    adapter = dataclasses.replace(make_adapter("d"), token_rows={"lm_head": rows})
    assert changed_rows("a", adapter, {}, 2) == {"lm_head": rows}
    with pytest.raises(AdapterInvalid, match="restart with max_lora_token_rows=2 if"):
        changed_rows("a", adapter, {}, 1)
