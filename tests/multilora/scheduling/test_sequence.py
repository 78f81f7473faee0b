"""Why and when a sequence ends."""

from __future__ import annotations

from typing import Any

import pytest

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
