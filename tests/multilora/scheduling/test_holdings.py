"""What running sequences hold: rows, slots, blocks."""

from __future__ import annotations

import pytest

from tests.harness.scheduler_house import House, answer


@pytest.mark.parametrize("caching", [True, False])
def test_later_answers_to_a_request_share_the_prompt_blocks_of_the_first(caching: bool) -> None:
    house = House(max_num_batched_tokens=8, enable_prefix_caching=caching)
    answers = [house.seq([1] * 14, n=3, max_tokens=2) for _ in range(3)]
    for index, each in enumerate(answers):
        each.index, each.arrival = index, answers[0].arrival
    prompt_tokens = 0
    while (plan := house.plan()) is not None:
        prompt_tokens += sum(min(c.count, max(14 - c.start, 0)) for c in plan.chunks)
        house.scheduler.update(plan, house.run(plan))
    assert prompt_tokens == (14 + 2 + 2 if caching else 3 * 14)
    assert all(len(answer.output_ids) == 2 for answer in answers)
    house.check_empty()


def test_rows_are_limited_and_reused() -> None:
    house = House(max_num_seqs=2)
    seqs = [house.seq([1], max_tokens=1) for _ in range(5)]
    assert house.step() == seqs[:2]
    assert house.step() == seqs[2:4]
    assert house.step() == seqs[4:]
    house.check_empty()


def test_an_aborted_sequence_holds_its_blocks_until_its_plans_are_committed() -> None:
    house = House()
    seq = house.seq([1, 2, 3])
    plans = [house.scheduler.schedule(), house.scheduler.schedule()]
    house.scheduler.abort(seq)
    for plan in plans:
        house.check()
        assert house.scheduler.running == [seq]
        assert plan is not None
        assert house.scheduler.update(plan, answer(plan)) == []
    house.check()
    assert not house.scheduler.running


def test_nothing_is_taken_from_a_sequence_that_is_being_computed() -> None:
    house = House(num_blocks=4)
    house.seq([1] * 7)
    house.seq([2] * 7)
    first = house.scheduler.schedule()  # both, two blocks each, full with the next token
    second = house.scheduler.schedule()
    assert first is not None
    assert second is not None
    assert house.scheduler.schedule() is None  # a third block is needed, and none is free
    house.scheduler.update(first, answer(first))
    assert house.scheduler.schedule() is None
    house.scheduler.update(second, answer(second))
    third = house.scheduler.schedule()
    assert third is not None
    assert len(third.chunks) == house.scheduler.num_preemptions == 1
    house.check()


def test_the_lowest_free_row_is_taken_first() -> None:
    house = House(max_num_seqs=4)
    seqs = [house.seq([1], max_tokens=9) for _ in range(4)]
    house.step()
    for seq in (seqs[2], seqs[0], seqs[1]):
        house.scheduler.abort(seq)
    later = [house.seq([1]) for _ in range(3)]
    house.step()
    assert [seq.request_slot for seq in later] == [0, 1, 2]
