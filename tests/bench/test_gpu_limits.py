"""What is called slow, and how it is told."""

from __future__ import annotations

from typing import Any

import pytest
from gpu_limits import COMPARATOR, KERNEL, STEP, Judge, card_of
from gpu_model import H200


@pytest.mark.parametrize(("limit", "us"), [(KERNEL, 3.0), (STEP, 1.5)])
def test_slow_is_beyond_the_limit(limit: float, us: float) -> None:
    content: dict[str, Any] = {}
    judge = Judge(content)
    beside = judge.beside("as slow as may be", 10 * us, 10, limit=limit)
    assert beside == {"predicted_us": 10, "measured_to_predicted": us}
    assert content["slow"] == []
    judge.beside("slower", 10 * us + 0.1, 10, limit=limit)
    (slow,) = content["slow"]
    assert (slow["case"], slow["of"], slow["limit"]) == ("slower", "its prediction", limit)


def test_the_best_comparator_counts() -> None:
    content: dict[str, Any] = {}
    judge = Judge(content)
    comparators = {"loop": 90.0, "vllm": 20.0, "bmm": 40.0}
    beside = judge.beside("close", 20 * COMPARATOR, 20, comparators=comparators)
    assert beside["measured_to_best_comparator"] == COMPARATOR
    assert content["slow"] == []
    judge.beside("behind", 24, 20, comparators=comparators)
    assert content["slow"] == [{"case": "behind", "times": 1.2, "of": "vllm", "limit": 1.05}]
    assert "measured_to_best_comparator" not in judge.beside("alone", 24, 20, comparators={})


def test_an_interpreter_is_not_compared() -> None:
    content: dict[str, Any] = {}
    found = Judge(content, compares=False).beside("a", 1e9, 1e9, comparators={"loop": 1.0})
    assert found["measured_to_best_comparator"] == 1e9
    assert content["slow"] == []


def test_the_worst_are_told_first() -> None:
    judge = Judge({})
    assert judge.closing() == "slow: 0"
    judge.beside("a kernel", 40, 10)
    judge.beside("a step", 30, 10, limit=STEP)
    judge.beside("a site", 10, 10, comparators={"vllm": 8.0})
    worst = "a step (3.0 x its prediction); a kernel (4.0 x its prediction); a site (1.25 x vllm)"
    assert judge.closing() == f"slow: 3: {worst}"
    assert judge.closing(1) == "slow: 3: a step (3.0 x its prediction)"


def test_an_unknown_card_has_the_bandwidth_that_was_measured() -> None:
    assert card_of("NVIDIA H200", 1e12) == H200
    other = card_of("NVIDIA L4", 2.7e11)
    assert (other.name, other.bandwidth, other.bf16) == ("NVIDIA L4", 2.7e11, H200.bf16)
