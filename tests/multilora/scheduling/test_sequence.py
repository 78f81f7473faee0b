"""Why and when a sequence ends."""

from __future__ import annotations

from typing import Any

import pytest

from multilora.outputs import Logprob
from tests.harness.scheduler_house import EOS, House


@pytest.mark.parametrize(
    ("params", "max_total", "tokens", "reason", "stop_reason"),
    [
        ({}, 256, [5, EOS], "stop", None),
        ({"stop_token_ids": [7]}, 256, [5, 7], "stop", 7),
        ({"stop_token_ids": [EOS]}, 256, [5, EOS], "stop", EOS),
        ({"min_tokens": 3, "max_tokens": 9}, 256, [EOS, EOS, EOS], "stop", None),
        ({"max_tokens": 2}, 256, [5, 5], "length", None),
        ({"max_tokens": 2}, 256, [5, EOS], "stop", None),
        ({}, 5, [5, 5], "length", None),
    ],
)
def test_a_sequence_ends_for_the_first_reason_that_holds(
    params: dict[str, Any], max_total: int, tokens: list[int], reason: str, stop_reason: int | None
) -> None:
    house = House()
    seq = house.seq([1, 3, 4], max_total=max_total, **params)
    for _ in tokens:
        assert seq.finish_reason is None
        assert house.step(token=lambda s: tokens[len(s.output_ids)]) == [seq]
    assert seq.output_ids == tokens
    assert seq.finish_reason is not None
    assert (seq.finish_reason.value, seq.stop_reason) == (reason, stop_reason)
    house.check_empty()


def test_any_span_of_tokens_is_that_of_prompt_and_output_together() -> None:
    seq = House().seq([1, 3, 4])
    seq.output_ids = [5, 6, 7]
    whole = [1, 3, 4, 5, 6, 7]
    for start in range(7):
        for end in range(start, 7):
            assert seq.tokens(start, end) == whole[start:end], (start, end)


def test_a_rewound_sequence_has_its_tokens_and_nothing_else() -> None:
    seq = House().seq([1, 3, 4], max_tokens=2)
    seq.output_ids, seq.output_logprobs = [5], [{5: Logprob(-1.0, 1)}, {6: Logprob(-1.0, 1)}]
    seq.num_scheduled, seq.num_computed, seq.num_pending = 5, 4, 1
    seq.blocks, seq.request_slot = [3, 4], 0
    assert seq.in_flight
    assert seq.is_ending  # with the token that is being sampled
    seq.rewind()
    assert (seq.num_scheduled, seq.num_computed, seq.num_pending) == (0, 0, 0)
    assert (seq.blocks, seq.request_slot, seq.finish_reason) == ([], None, None)
    assert (seq.output_ids, len(seq.output_logprobs)) == ([5], 1)
    assert not seq.is_ending
