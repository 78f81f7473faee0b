"""Weights of the base beside a LoRA on them: equal, a rounding of each other, or another base's."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from multilora.adapters.base_weights import check_base
from multilora.errors import AdapterInvalid
from tests.harness.small_stores import make_adapter

WEIGHT = torch.randn(12, 4)


def test_one_may_be_a_rounding_of_the_other() -> None:
    for saved, own in ((WEIGHT, WEIGHT), (WEIGHT, WEIGHT.bfloat16()), (WEIGHT.half(), WEIGHT)):
        adapter = dataclasses.replace(make_adapter("d"), base_weights={"embed": saved})
        check_base("a", adapter, {"embed": own})
    check_base("a", make_adapter("d"), {})


def test_another_base_is_refused() -> None:
    adapter = dataclasses.replace(make_adapter("d"), base_weights={"embed": WEIGHT * 1.01})
    for base in ({"embed": WEIGHT}, {"lm_head": WEIGHT * 1.01}, {}):
        with pytest.raises(AdapterInvalid, match="adapter 'a' was trained with a changed base"):
            check_base("a", adapter, base)
