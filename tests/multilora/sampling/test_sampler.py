"""What both samplers are given: the columns of a step's rows, and why a row may have no token."""

from __future__ import annotations

import math

import torch

from multilora.sampling.sampler import GREEDY_BELOW, MESSAGES, SampleError
from tests.harness.sampler_calls import Request, make_row, rows_of

VOCAB = 100
CPU = torch.device("cpu")


def test_settings_become_what_a_draw_takes() -> None:
    rows = rows_of(
        [
            make_row(temperature=0.5, top_k=7, top_p=0.9, min_p=0.25),
            make_row(temperature=0),
            make_row(temperature=2, top_k=-1),
            make_row(top_k=VOCAB + 1),
        ],
        VOCAB,
        CPU,
    )
    assert [state.is_greedy for state in rows.states] == [False, True, False, False]
    random = rows.random([0, 2, 3], VOCAB)
    assert random.rows.tolist() == [0, 2, 3]
    assert random.temperature.tolist() == [0.5, 2, 1]
    assert random.top_k.tolist() == [7, VOCAB, VOCAB]  # none, or too many: all
    assert random.top_p.tolist() == [0.9, 1, 1]
    assert random.log_min_p.tolist() == [math.log(0.25), -math.inf, -math.inf]
    assert all(0 <= number < 2**53 for number in random.numbers.tolist())


def test_a_tiny_temperature_is_none() -> None:
    greedy, not_greedy = make_row(temperature=GREEDY_BELOW / 2), make_row(temperature=GREEDY_BELOW)
    rows = rows_of([greedy, not_greedy], VOCAB, CPU)
    assert [state.is_greedy for state in rows.states] == [True, False]


def test_random_numbers_are_those_of_the_seed_and_the_position() -> None:
    def number(request: Request) -> int:
        return int(rows_of([request], VOCAB, CPU).random([0], VOCAB).numbers[0])

    first = make_row([1, 2], [3], seed=5)
    assert number(first) == number(make_row([9], [8], seed=5))
    assert number(first) != number(make_row([1, 2], [3], seed=6))
    assert number(first) != number(make_row([1, 2], [3, 3], seed=5))


def test_only_rows_that_change_their_logits_have_processors() -> None:
    stop = frozenset([2])
    rows = rows_of(
        [
            make_row(),
            make_row(logit_bias={1: 2.0}),
            make_row([], [4], stop=stop, min_tokens=1),  # has as many as it must
            make_row([], [4], stop=stop, min_tokens=2),
        ],
        VOCAB,
        CPU,
    )
    assert sorted(rows.processors()) == [1, 3]


def test_rows_say_how_many_logprobs_they_want() -> None:
    rows = rows_of([make_row(logprobs=k) for k in (None, 0, 4)], VOCAB, CPU)
    assert rows.logprobs() == {1: 0, 2: 4}


def test_every_error_has_a_text_and_no_error_none() -> None:
    assert MESSAGES.keys() == set(SampleError)
    assert [error for error in SampleError if not MESSAGES[error]] == [SampleError.NONE]
