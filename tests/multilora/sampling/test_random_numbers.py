"""Random numbers: fixed for good, by seed and position alone."""

from __future__ import annotations

from collections import Counter

import numpy as np

from multilora.sampling.random_numbers import random_numbers, random_stream
from tests.harness.sampler_calls import (
    make_logits,
    make_row,
    sample,
)


def uniform(seed: int, position: int) -> int:
    streams = np.array([random_stream(seed)], np.uint64)
    return int(random_numbers(streams, np.array([position]))[0])


def test_uniform_fills_the_unit_interval_and_depends_on_both_keys() -> None:
    drawn = [
        uniform(seed, position)
        for seed in (-(2**63), -1, 0, 1, 2**63 - 1)
        for position in range(400)
    ]
    assert len(set(drawn)) == len(drawn)
    assert all(0 <= u < 2**53 for u in drawn)
    eighths = Counter(u >> 50 for u in drawn)
    assert len(eighths) == 8
    assert sum((n - 250) ** 2 / 250 for n in eighths.values()) < 24.4  # p = 0.001


def test_draws_are_fixed_for_good() -> None:
    # A change here changes what every stored seed gives: say so in the change log.
    assert [uniform(0, 0), uniform(0, 1), uniform(42, 0)] == [
        5876733520225071,
        6315957190297641,
        3092098744885774,
    ]


def test_a_draw_is_keyed_by_seed_and_position_alone() -> None:
    logits = make_logits(1, 500)
    row = make_row(output=[1, 2, 3], seed=5)
    alone = sample(logits, [row])
    again = make_row(prompt=[8, 9], output=[7, 7, 7], seed=5)
    assert sample(logits, [again]) == alone
    others = {sample(logits, [make_row(output=[1] * i, seed=5)])[0].token for i in range(20)}
    assert len(others) > 5
