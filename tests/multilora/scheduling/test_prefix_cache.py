"""Which start of a sequence is found in the cache."""

from __future__ import annotations

from typing import Any

import pytest

from tests.harness.scheduler_house import House


def test_a_prefix_is_taken_from_the_cache_but_for_the_last_token() -> None:
    house = House()
    house.seq([1] * 8, max_tokens=1)
    house.step()
    again = house.seq([1] * 8, max_tokens=1)
    plan = house.plan()
    assert plan is not None
    assert (plan.chunks[0].start, plan.chunks[0].count, again.num_cached) == (4, 4, 4)
    house.scheduler.update(plan, house.run(plan))
    longer = house.seq([1] * 9, max_tokens=1)
    house.step()
    assert longer.num_cached == 8
    house.check_empty()


@pytest.mark.parametrize(
    ("mix", "params", "enabled"),
    [("other", {}, True), ("", {}, True), ("a", {"prompt_logprobs": 1}, True), ("a", {}, False)],
)
def test_no_prefix_is_shared_across_identities_or_when_all_logits_are_needed(
    mix: str, params: dict[str, Any], enabled: bool
) -> None:
    house = House(enable_prefix_caching=enabled)
    house.seq([1] * 9, mix="a", max_tokens=1)
    house.step()
    seq = house.seq([1] * 9, mix=mix, max_tokens=1, **params)
    house.step()
    assert seq.num_cached == 0


def test_outputs_are_published_too_for_the_next_turn() -> None:
    house = House()
    house.seq([1] * 3, max_tokens=6)
    while house.step():
        pass
    seq = house.seq([1] * 3 + [9] * 6)
    house.step()
    assert seq.num_cached == 8  # 3 + 5: the last token's KV was never computed
