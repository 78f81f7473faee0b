"""The order of the waiting sequences, and what a long queue costs."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from multilora.scheduling.waiting_queue import WaitingQueue
from tests.harness.failpoints import calls_of
from tests.harness.scheduler_house import House


def sequences(count: int) -> list[Any]:
    house = House()
    return [house.seq([1], mix="ab"[i % 2] if i % 3 else "") for i in range(count)]


@given(st.permutations(range(8)), st.sets(st.integers(0, 7)))
def test_any_order_of_adding_gives_the_order_of_arrival(order: list[int], gone: set[int]) -> None:
    seqs = sequences(8)
    queue = WaitingQueue()
    for number in order:
        queue.add(seqs[number])
    for number in sorted(gone):
        queue.remove(seqs[number])
    queue.check_integrity()
    left = [seq for number, seq in enumerate(seqs) if number not in gone]
    assert list(queue) == left
    assert len(queue) == len(left)
    assert set(queue.mixes) == {seq.mix for seq in left}
    assert [seq in queue for seq in seqs] == [number not in gone for number in range(8)]
    assert list(WaitingQueue(left[::-1])) == left


def test_answers_to_one_request_come_in_their_order() -> None:
    answers = sequences(3)
    for answer in answers:
        answer.arrival = 0
    assert list(WaitingQueue(answers[::-1])) == answers


def test_whether_any_waits_for_a_mix() -> None:
    a, b = ((("a", 1.0),), (("b", 1.0),))
    house = House()
    queue = WaitingQueue([house.seq([1], mix="a")])
    assert queue.has_any(None)
    assert queue.has_any([b, a])
    assert not queue.has_any([b])
    assert not WaitingQueue().has_any(None)
    queue.add(house.seq([1]))  # the base needs no slot
    assert queue.has_any([b])


@pytest.mark.parametrize("adapters", [1, 3, 1000], ids=lambda n: f"of {n}")
@pytest.mark.parametrize("starved", [False, True])
def test_a_step_beside_those_without_a_slot_costs_the_same_for_any_number_of_them(
    adapters: int, starved: bool
) -> None:
    """Calls are counted. Two slots are taken for good, request slots and blocks are free."""

    def calls(waiting: int) -> int:
        house = House(num_slots=2, num_blocks=256, max_num_seqs=8)
        for name in ("x", "y"):
            house.seq([1, 3], mix=name, max_tokens=200)
        house.step()
        blocked = [house.seq([1], mix=f"{i % adapters}") for i in range(waiting)]
        if starved:  # from now on nobody may overtake the first one
            blocked[0].num_overtaken = 8
            house.seq([1], mix="x")
        house.step()
        plan = calls_of(house.scheduler.schedule)
        assert len(house.scheduler.running) == 2
        assert len(house.scheduler.waiting) == waiting + starved
        return plan

    assert calls(400) == calls(50)


def test_a_policy_that_sees_a_long_queue_sees_all_of_it_in_order() -> None:
    seen: list[Any] = []

    class Looks:
        def order(self, waiting: Any, view: object) -> Any:
            seen.append(list(waiting))
            return waiting

    house = House(max_num_seqs=2)
    house.scheduler._policy = Looks()
    seqs = [house.seq([1]) for _ in range(5)]
    house.step()
    assert seen == [seqs]
    assert list(house.scheduler.waiting) == seqs[2:]
