"""Which start of a sequence is found in the cache."""

from __future__ import annotations

from typing import Any

import pytest

from multilora.scheduling.sequence import Sequence
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


def test_what_precedes_an_invocation_is_the_bases_and_shared_by_all() -> None:
    """The block in which it lies, and those behind it, are the adapter's own."""
    house = House(num_slots=8)
    prompt = list(range(10, 30))
    house.seq(prompt, max_tokens=1)
    house.step()
    for mix, start, cached in (
        ("a", 10, 8),
        ("b", 10, 8),
        ("a", 10, 16),
        ("a", 8, 8),
        ("a", 12, 12),
        ("c", 0, 0),
    ):
        seq = house.seq(prompt, mix=mix, adapter_start=start, max_tokens=1)
        house.step()
        assert seq.num_cached == cached, (mix, start)
    house.check_empty()


def test_who_begins_like_one_that_runs_waits_for_its_blocks() -> None:
    """Of five on one text each block is computed once; whoever shares nothing goes on."""
    house = House(num_slots=8, max_num_batched_tokens=16)
    text = list(range(10, 30))
    seqs = [house.seq([*text, i], mix=f"m{i}", adapter_start=20, max_tokens=1) for i in range(4)]
    base, other = house.seq([*text, 99], max_tokens=1), house.seq([7] * 5, max_tokens=1)
    plan = house.plan()
    assert plan is not None
    assert [(c.start, c.count) for c in plan.chunks] == [(0, 16)]
    house.scheduler.update(plan, house.run(plan))
    while house.step() is not None:
        pass
    assert [seq.num_cached for seq in (*seqs, base, other)] == [0, 20, 20, 20, 20, 0]
    house.check_empty()


@pytest.mark.parametrize("caching", [True, False])
def test_nobody_waits_for_what_will_not_be_shared(caching: bool) -> None:
    house = House(enable_prefix_caching=caching)
    house.seq([1] * 9)
    scored = house.seq([1] * 9, prompt_logprobs=1)
    short, others = house.seq([1] * 4), house.seq([1] * 9, mix="a")
    alike = house.seq([1] * 9)
    plan = house.plan()
    assert plan is not None
    assert all(seq.request_slot is not None for seq in (scored, short, others))
    assert (alike.request_slot is None) == caching


def test_a_prompt_is_computed_by_another_when_the_first_is_aborted() -> None:
    house = House(max_num_batched_tokens=4)
    first, second = house.seq([1] * 12), house.seq([1] * 12, max_tokens=1)
    house.step()
    house.scheduler.abort(first)
    while house.step() is not None:
        pass
    assert second.output_ids
    assert second.num_cached == 4
    house.check_empty()


def test_a_long_queue_on_one_text_is_not_gone_through() -> None:
    house = House(max_num_seqs=4, max_num_batched_tokens=8)
    for _ in range(300):
        house.seq([1] * 40, max_tokens=1)
    asked: list[Sequence] = []
    match = house.scheduler._prefixes.match
    house.scheduler._prefixes.match = lambda seq: asked.append(seq) or match(seq)  # type: ignore[method-assign,func-returns-value]
    house.step()
    house.step()
    assert len(asked) < 20
