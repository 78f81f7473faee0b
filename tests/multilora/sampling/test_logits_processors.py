"""What a request does to its logits. Oracle: transformers' logits processors."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.harness.sampler_calls import (
    make_logits,
    make_row,
    reachable,
    sample,
)


# -- masks, bias, penalties --
def test_only_allowed_tokens_are_chosen() -> None:
    logits = make_logits(1, 30)[0]
    allowed = [3, 17, 17, 29]
    assert reachable(logits, draws=600, temperature=5.0, allowed_token_ids=allowed) == {3, 17, 29}
    best = max(allowed, key=lambda i: float(logits[i]))
    assert reachable(logits, draws=1, temperature=0, allowed_token_ids=allowed) == {best}


def test_logit_bias_moves_the_greedy_choice() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    row = make_row(temperature=0, logit_bias={0: -1.5, 2: 0.75, 3: 1.0})
    assert sample(logits, [row])[0].token == 1
    assert sample(logits, [make_row(temperature=0, logit_bias={3: 100})])[0].token == 3


def test_stop_ids_wait_for_min_tokens() -> None:
    logits = torch.tensor([[9.0, 8.0, 1.0]])
    for outputs, expected in ((0, 2), (1, 2), (2, 0)):
        row = make_row(
            output=[2] * outputs, stop=frozenset({0, 1}), temperature=0, min_tokens=2, max_tokens=9
        )
        assert sample(logits, [row])[0].token == expected


def test_repetition_penalty_agrees_with_transformers() -> None:
    processors = pytest.importorskip("transformers.generation.logits_process")
    prompt, output = [1, 5, 5, 9], [9, 12]
    oracle = processors.RepetitionPenaltyLogitsProcessor(penalty=1.8)
    for seed in range(30):
        logits = make_logits(1, 16, seed)
        expected = oracle(torch.tensor([prompt + output]), logits.clone())
        row = make_row(prompt, output, temperature=0, repetition_penalty=1.8)
        assert sample(logits, [row])[0].token == int(expected.argmax())


def test_presence_and_frequency_count_the_output_only() -> None:
    logits = torch.tensor([[3.0, 2.6, 2.2, 0.0]])
    history: dict[str, Any] = {"prompt": [2, 2, 2], "output": [0, 0, 1], "temperature": 0}
    for presence, frequency, expected in (
        (0.0, 0.0, 0),
        (0.3, 0.0, 0),  # 2.7 2.3 2.2
        (0.9, 0.0, 2),  # 2.1 1.7 2.2
        (0.0, 0.3, 0),  # 2.4 2.3 2.2
        (0.0, 0.35, 0),  # 2.3 2.25 2.2
        (0.0, 0.39, 0),  # 2.22 2.21 2.2
        (0.0, 0.45, 2),  # 2.1 2.15 2.2
        (-1.0, 0.7, 1),  # 2.6 2.9 2.2
    ):
        row = make_row(**history, presence_penalty=presence, frequency_penalty=frequency)
        assert sample(logits, [row])[0].token == expected, (presence, frequency)


def test_penalties_leave_the_given_logits_alone() -> None:
    logits = make_logits(1, 20)
    before = logits.clone()
    everything: dict[str, Any] = {
        "repetition_penalty": 2.0,
        "presence_penalty": 1.0,
        "logit_bias": {1: 3.0},
        "allowed_token_ids": [1, 2],
        "min_tokens": 3,
    }
    sample(logits, [make_row([1], [2], stop=frozenset({2}), **everything)])
    assert torch.equal(logits, before)


@pytest.mark.parametrize("params", [{"logit_bias": {8: 1.0}}, {"allowed_token_ids": [8]}])
def test_ids_outside_the_vocabulary_are_our_own_bug(params: dict[str, Any]) -> None:
    with pytest.raises(AssertionError, match="out of vocabulary"):
        sample(torch.zeros(1, 8), [make_row(**params)])
