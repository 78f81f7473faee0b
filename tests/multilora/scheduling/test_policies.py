"""The order in which sequences are admitted."""

from __future__ import annotations

import pytest

from multilora.errors import ConfigError
from multilora.scheduling.policies import Fcfs, View, checked_order, policy_named
from tests.harness.scheduler_house import House


def test_fcfs_is_by_arrival_and_an_unknown_policy_is_named() -> None:
    house = House()
    seqs = [house.seq([1]) for _ in range(3)]
    assert list(Fcfs().order(tuple(seqs), View((), 0))) == seqs
    with pytest.raises(ConfigError, match="'lifo'; known policies: fcfs"):
        policy_named("lifo")
    with pytest.raises(ConfigError, match="lifo"):
        House(policy="lifo")


def test_a_policy_may_leave_out_but_not_repeat_or_invent() -> None:
    house = House()
    seqs = tuple(house.seq([1]) for _ in range(3))

    class Fixed:
        def __init__(self, *found: object) -> None:
            self.found = found

        def order(self, *_: object) -> list[object]:
            return list(self.found)

    def checked(*found: object) -> list[object]:
        return list(checked_order(Fixed(*found), seqs, View((), 0)))  # type: ignore[arg-type]

    assert checked(seqs[2], seqs[0]) == [seqs[2], seqs[0]]
    assert checked() == []
    for wrong in ((seqs[0], seqs[0]), (house.seq([1]),), (5,)):
        with pytest.raises(ValueError, match="policy Fixed must order the waiting"):
            checked(*wrong)
