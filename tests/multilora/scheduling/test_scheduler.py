"""Who runs when, against a fake runner that computes nothing and a fake adapter table."""

from __future__ import annotations

import pytest

from multilora.errors import CapacityError
from multilora.outputs import FinishReason
from multilora.scheduling.block_pool import ROOT_KEY, block_key
from multilora.scheduling.scheduler_output import ChunkResult, StepResult
from tests.harness.scheduler_house import EOS, House, answer


def test_a_sequence_is_prefilled_in_chunks_then_decoded_to_its_length() -> None:
    house = House(max_num_batched_tokens=4)
    seq = house.seq(list(range(10, 20)), max_tokens=3)
    spans = []
    while (plan := house.plan()) is not None:
        spans += [(chunk.start, chunk.count, chunk.samples) for chunk in plan.chunks]
        house.scheduler.update(plan, house.run(plan))
    assert spans == [
        (0, 4, False),
        (4, 4, False),
        (8, 2, True),
        (10, 1, True),
        (11, 1, True),
    ]
    assert seq.output_ids == [9, 9, 9]
    assert seq.finish_reason is FinishReason.LENGTH
    house.check_empty()


def test_decodes_share_the_budget_with_a_new_prefill() -> None:
    house = House(max_num_batched_tokens=6)
    house.seq([1, 3], max_tokens=9)
    house.step()
    house.seq(list(range(10, 20)))
    plan = house.plan()
    assert plan is not None
    assert [(c.request_slot, c.start, c.count) for c in plan.chunks] == [(0, 2, 1), (1, 0, 5)]
    assert [(n.request_slot, n.num_prompt, n.token_ids) for n in plan.new_sequences] == [
        (1, 10, list(range(10, 20)))
    ]


def test_a_failed_row_ends_with_an_error_and_publishes_nothing() -> None:
    house = House()
    bad, good = house.seq([1] * 9), house.seq([3] * 9)
    assert house.step(failed=0) == [bad, good]
    assert (bad.finish_reason, bad.output_ids) == (FinishReason.ERROR, [])
    assert good.finish_reason is None
    for token, found in ((1, 0), (3, 2)):
        first = block_key(ROOT_KEY, ((0, bad.identity),), [token] * 4)
        keys = [first, block_key(first, ((0, bad.identity),), [token] * 4)]
        assert len(house.pool.match(keys)) == found


def test_only_chunks_with_something_to_tell_are_reported() -> None:
    house = House(max_num_batched_tokens=4)
    house.seq(list(range(6)))
    assert house.step() == []
    assert len(house.step() or []) == 1
    scored = House(max_num_batched_tokens=4)
    seq = scored.seq(list(range(6)), prompt_logprobs=0)
    assert scored.step() == [seq]


def test_the_last_arrival_is_preempted_and_recomputed() -> None:
    house = House(num_blocks=4)
    first, last = house.seq([1] * 7, max_tokens=8), house.seq([3] * 7, max_tokens=8)
    house.step()
    house.step()
    assert house.pool.num_free == 0
    plan = house.plan()
    assert plan is not None
    assert house.scheduler.num_preemptions == 1
    assert house.scheduler.running == [first]
    assert list(house.scheduler.waiting) == [last]  # and not admitted in the same plan
    assert plan.freed_request_slots == (1,)
    assert (last.num_scheduled, last.blocks, last.request_slot) == (0, [], None)
    house.scheduler.update(plan, house.run(plan))
    while house.step():
        pass
    for seq in (first, last):
        assert len(seq.output_ids) == 8
    house.check_empty()


def test_a_preempted_sequence_finds_its_own_blocks_which_is_no_hit() -> None:
    house = House(num_blocks=5)
    first, last = house.seq([1] * 7, max_tokens=5), house.seq([3] * 7, max_tokens=5)
    while first.finish_reason is None:
        house.step()
    assert list(house.scheduler.waiting) == [last]
    plan = house.plan()
    assert plan is not None
    assert (plan.chunks[0].start, plan.chunks[0].count) == (8, 1)
    assert plan.new_sequences[0].token_ids == [3] * 7 + [9] * 2
    assert last.num_cached == 0


def test_no_one_is_admitted_in_a_plan_that_preempts() -> None:
    house = House(num_blocks=4, max_num_batched_tokens=5, enable_prefix_caching=False)
    first, last = house.seq([1] * 7, max_tokens=8), house.seq([3] * 7, max_tokens=8)
    while house.scheduler.num_preemptions == 0:
        newcomer = house.seq([4])
        plan = house.plan()
        assert plan is not None
        house.scheduler.update(plan, house.run(plan))
        if house.scheduler.num_preemptions:
            assert plan.new_sequences == ()
        house.scheduler.abort(newcomer)
    assert house.pool.num_free == 1  # enough for a first chunk
    assert list(house.scheduler.waiting) == [last]
    assert house.scheduler.running == [first]


def test_a_later_arrival_preempts_itself_rather_than_an_earlier_one() -> None:
    house = House(num_blocks=3)
    first, last = house.seq([1] * 5, max_tokens=3), house.seq([3] * 4, max_tokens=3)
    house.step()
    house.step()
    assert house.scheduler.running == [first]
    assert list(house.scheduler.waiting) == [last]
    while house.step():
        pass
    assert len(last.output_ids) == 3


def test_a_sequence_without_blocks_is_not_overtaken() -> None:
    house = House(num_blocks=4)
    house.seq([1] * 9, max_tokens=2)
    house.step()
    big, small = house.seq([3] * 9, max_tokens=1), house.seq([4], max_tokens=1)
    house.step()
    assert house.scheduler.running == []
    assert list(house.scheduler.waiting) == [big, small]
    assert house.step() == [big, small]


@pytest.mark.parametrize("why", ["cold", "no slot"])
def test_a_sequence_without_its_adapter_is_skipped(why: str) -> None:
    house = House(num_slots=1)
    house.seq([1], mix="a", max_tokens=3)
    house.step()
    if why == "cold":
        house.slots.cold.add((("b", 1.0),))
    blocked = house.seq([1], mix="b", max_tokens=1)
    same, base = house.seq([1], mix="a", max_tokens=9), house.seq([1], max_tokens=9)
    house.step()
    assert list(house.scheduler.waiting) == [blocked]
    assert same in house.scheduler.running
    assert base in house.scheduler.running
    house.slots.cold.clear()
    for seq in list(house.scheduler.running):
        house.scheduler.abort(seq)
    assert house.step() == [blocked]


def test_a_sequence_without_a_slot_is_overtaken_only_so_often() -> None:
    house = House(num_slots=1, max_num_seqs=3)
    house.seq([1], mix="a", max_tokens=4)
    house.step()
    blocked = house.seq([1], mix="b", max_tokens=1)
    for _ in range(
        40
    ):  # some "a" always runs or waits, so that its slot never falls free by itself
        house.seq([1], mix="a", max_tokens=4)
        house.step()
        if blocked not in house.scheduler.waiting:
            break
    assert blocked.num_overtaken == 3
    assert blocked.finish_reason is FinishReason.LENGTH


def test_the_base_needs_no_slot_and_may_pass_a_sequence_that_waits_for_one() -> None:
    house = House(num_slots=1, max_num_seqs=3)
    house.seq([1], mix="a", max_tokens=40)
    house.step()
    blocked = house.seq([1], mix="b", max_tokens=1)
    for _ in range(6):
        base = house.seq([1], max_tokens=1)
        assert house.step() != []
        assert base.finish_reason is FinishReason.LENGTH
    assert blocked.num_overtaken == 0
    assert blocked in house.scheduler.waiting


def test_the_other_answers_wait_for_the_one_that_scores_the_prompt() -> None:
    house = House(max_num_batched_tokens=64)
    first = house.seq([1] * 14, n=2, prompt_logprobs=0, max_tokens=1)
    other = house.seq([1] * 14, n=2, max_tokens=1)
    other.index, other.arrival = 1, first.arrival
    assert house.step() == [first]
    assert house.step() == [other]
    assert other.num_cached == 12


def test_nothing_is_planned_while_every_adapter_is_cold() -> None:
    house = House()
    house.slots.cold.add((("a", 1.0),))
    house.seq([1], mix="a")
    assert house.plan() is None
    house.slots.cold.clear()
    assert house.plan() is not None


def test_abort_works_in_every_state() -> None:
    house = House(max_num_seqs=2)
    running, flying, waiting = (house.seq([n] * 5) for n in (3, 4, 5))
    house.scheduler.abort(waiting)
    assert list(house.scheduler.waiting) == [running, flying]
    house.step()
    house.scheduler.abort(running)
    house.check()
    assert running.request_slot is None
    plan = house.plan()
    assert plan is not None
    assert plan.freed_request_slots == (0,)
    house.scheduler.abort(flying)
    house.check()
    assert flying.blocks, "the runner still writes them"
    outputs = list(flying.output_ids)
    assert house.scheduler.update(plan, house.run(plan)) == []
    assert flying.output_ids == outputs
    assert {s.finish_reason for s in (running, flying, waiting)} == {FinishReason.ABORT}
    house.scheduler.abort(flying)
    house.check_empty()


def test_a_preempted_sequence_can_be_aborted() -> None:
    house = House(num_blocks=4)
    house.seq([1] * 7, max_tokens=8)
    last = house.seq([3] * 7, max_tokens=8)
    while last not in house.scheduler.waiting or not last.output_ids:
        house.step()
    house.scheduler.abort(last)
    while house.step():
        pass
    house.check_empty()


def test_the_engine_can_finish_a_sequence_for_a_stop_string() -> None:
    house = House()
    seq, ended = house.seq([1] * 5), house.seq([3] * 5, max_tokens=1)
    house.step()
    for each in (seq, ended):
        house.scheduler.finish(each, FinishReason.STOP, "END")
        assert (each.finish_reason, each.stop_reason) == (FinishReason.STOP, "END")
    house.scheduler.abort(seq)
    assert seq.finish_reason is FinishReason.STOP
    house.check_empty()


def test_what_can_never_fit_is_refused_and_what_fills_the_pool_ends() -> None:
    house = House(num_blocks=2)
    with pytest.raises(CapacityError, match="KV pool of 2 blocks"):
        house.seq([1] * 8)
    seq = house.seq([1] * 7, max_tokens=100)
    assert house.step() == [seq]
    assert seq.finish_reason is FinishReason.LENGTH
    with pytest.raises(CapacityError, match="max_model_len 256"):
        House(num_blocks=100).seq([1] * 256)
    house.check_empty()


def test_plans_are_committed_once_and_in_their_order() -> None:
    house = House()
    house.seq([1])
    first, second = house.scheduler.schedule(), house.scheduler.schedule()
    assert first is not None
    assert second is not None
    results = [StepResult((ChunkResult(0, 9, None, None),)) for _ in range(2)]
    house.seq([1])
    third = house.scheduler.schedule()
    assert third is not None
    house.scheduler.update(first, results[0])
    with pytest.raises(AssertionError, match="not the oldest step"):
        house.scheduler.update(third, results[0])


def test_a_plan_ahead_counts_on_a_token_that_is_not_sampled_yet() -> None:
    house = House()
    seq = house.seq([1, 2, 3])
    first, second = house.scheduler.schedule(), house.scheduler.schedule()
    assert first is not None
    assert second is not None
    assert [(c.start, c.count, c.samples) for c in first.chunks] == [(0, 3, True)]
    assert [(c.start, c.count, c.samples) for c in second.chunks] == [(3, 1, True)]
    assert (seq.num_tokens, seq.num_scheduled, seq.num_computed, seq.num_pending) == (3, 4, 0, 2)
    house.scheduler.update(first, answer(first))
    house.check()
    assert (seq.num_tokens, seq.num_scheduled, seq.num_computed, seq.num_pending) == (4, 4, 3, 1)
    house.scheduler.update(second, answer(second))
    assert seq.output_ids == [9, 9]


def test_nothing_is_planned_beyond_a_length_that_is_known_to_end_it() -> None:
    house = House()
    house.seq([1, 2], max_tokens=2)
    house.seq([1, 2], max_total=4)
    plans = [house.scheduler.schedule(), house.scheduler.schedule()]
    assert all(plan is not None and len(plan.chunks) == 2 for plan in plans)
    assert house.scheduler.schedule() is None
    for plan in plans:
        assert plan is not None
        house.scheduler.update(plan, answer(plan))
    assert not house.scheduler.running
    house.check()


def test_what_a_plan_ahead_computed_for_an_ended_sequence_is_dropped() -> None:
    house = House()
    seq = house.seq([1, 2, 3])
    first, second = house.scheduler.schedule(), house.scheduler.schedule()
    assert first is not None
    assert second is not None
    assert house.scheduler.update(first, answer(first, EOS)) == [seq]
    house.check()
    assert seq.finish_reason == FinishReason.STOP
    assert house.scheduler.running == [seq]  # its blocks are still being written
    assert house.scheduler.schedule() is None
    assert house.scheduler.update(second, answer(second)) == []
    assert seq.output_ids == [EOS]
    assert house.pool.num_free == house.pool.num_blocks
