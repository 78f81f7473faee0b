"""Choosing tokens. Oracles: transformers' logits processors, and log_softmax in float64."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from multilora.sampling.random_numbers import random_numbers, random_stream
from multilora.sampling.sampler import SampledToken, SampleError
from tests.harness.sampler_calls import (
    failed,
    make_logits,
    make_row,
    mixed_rows,
    reachable,
    sample,
    token_logprobs,
)

if TYPE_CHECKING:
    from torch import Tensor

INF = math.inf


def uniform(seed: int, position: int) -> int:
    streams = np.array([random_stream(seed)], np.uint64)
    return int(random_numbers(streams, np.array([position]))[0])


def surviving(scores: Tensor) -> set[int]:
    return set(scores[0].isfinite().nonzero().flatten().tolist())


# -- greedy and failures --
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_greedy_takes_the_largest_logit_in_any_dtype(dtype: torch.dtype) -> None:
    logits = make_logits(11, 50).to(dtype)
    rows = [make_row(temperature=0) for _ in range(11)]
    expected = [SampledToken(int(row.argmax()), None, None) for row in logits]
    assert sample(logits, rows) == expected


@pytest.mark.parametrize("setting", [{}, {"presence_penalty": 0.1}, {"logit_bias": {0: -1.0}}])
@pytest.mark.parametrize("vocab", [7, 1000, 40000])
def test_greedy_ties_take_the_lowest_id(setting: dict[str, Any], vocab: int) -> None:
    logits = torch.zeros(3, vocab)
    logits[:, [5, 6, vocab - 1]] = 2.0
    rows = [make_row(temperature=0, **setting) for _ in range(3)]
    assert [s.token for s in sample(logits, rows)] == [5, 5, 5]


def test_a_tiny_temperature_is_greedy() -> None:
    logits = torch.tensor([[1.0, 1.0 + 1e-6, 0.0]])
    assert {sample(logits, [make_row(seed=i, temperature=9e-6)])[0].token for i in range(20)} == {1}


def test_no_rows_give_no_tokens() -> None:
    assert sample(torch.zeros(0, 8), []) == token_logprobs(torch.zeros(0, 8), [], 3) == []


@pytest.mark.parametrize(
    "broken",
    [[0.0, math.nan, 1.0, INF], [0.0, INF, 1.0, 2.0], [-INF] * 4, [math.nan] * 4],
    ids=["nan", "inf", "nothing finite", "all nan"],
)
@pytest.mark.parametrize("params", [{"temperature": 0}, {}, {"logprobs": 2}])
def test_a_broken_row_fails_alone(broken: list[float], params: dict[str, Any]) -> None:
    logits = make_logits(5, 4)
    rows = [make_row(seed=i, **params) for i in range(5)]
    clean = sample(logits, rows)
    logits[2] = torch.tensor(broken)
    got = sample(logits, rows)
    assert got[2] == failed(SampleError.NOT_FINITE)
    assert got[:2] + got[3:] == clean[:2] + clean[3:]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_whose_settings_leave_no_token_fails(temperature: float) -> None:
    row = make_row(
        stop=frozenset({2}), allowed_token_ids=[2], min_tokens=1, temperature=temperature
    )
    assert sample(torch.zeros(1, 4), [row]) == [failed(SampleError.NO_TOKEN)]


def test_masked_logits_are_no_failure_and_never_drawn() -> None:
    logits = torch.tensor([-INF, 0.0, -INF, 0.0])
    assert reachable(logits, draws=200) == {1, 3}
    assert reachable(logits, draws=200, top_k=3, top_p=0.99, min_p=0.1) == {1, 3}


# -- truncation --


# Temperature 2 flattens the survivors enough for 600 draws to reach every one of them.
@pytest.mark.parametrize(
    ("warper", "params"),
    [
        ("TopKLogitsWarper", {"top_k": 1}),
        ("TopKLogitsWarper", {"top_k": 6}),
        ("TopPLogitsWarper", {"top_p": 0.01}),
        ("TopPLogitsWarper", {"top_p": 0.5}),
        ("TopPLogitsWarper", {"top_p": 0.8}),
        ("MinPLogitsWarper", {"min_p": 1.0}),
        ("MinPLogitsWarper", {"min_p": 0.2}),
    ],
)
def test_truncation_keeps_what_transformers_keeps(warper: str, params: dict[str, Any]) -> None:
    processors = pytest.importorskip("transformers.generation.logits_process")
    oracle = getattr(processors, warper)(**params)
    logits = make_logits(1, 40, seed=3)
    expected = surviving(oracle(None, logits / 2.0))
    assert reachable(logits[0], temperature=2.0, **params) == expected


def test_truncations_apply_in_turn_as_in_transformers() -> None:
    processors = pytest.importorskip("transformers.generation.logits_process")
    logits = make_logits(1, 60, seed=4)
    scores = processors.MinPLogitsWarper(0.1)(None, logits / 2.5)
    scores = processors.TopKLogitsWarper(8)(None, scores)
    expected = surviving(processors.TopPLogitsWarper(0.7)(None, scores))
    assert 2 < len(expected) < 8
    got = reachable(logits[0], temperature=2.5, min_p=0.1, top_k=8, top_p=0.7)
    assert got == expected


def test_ties_at_the_last_place_survive_top_k() -> None:
    logits = torch.tensor([1.0, 2.0, 1.0, 0.0])
    assert reachable(logits, draws=300, top_k=2) == {0, 1, 2}


@pytest.mark.parametrize("top_k", [0, -1, 4, 99])
def test_top_k_of_all_keeps_all(top_k: int) -> None:
    assert reachable(torch.zeros(4), draws=200, top_k=top_k) == {0, 1, 2, 3}


# -- draws --
def test_frequencies_are_the_probabilities() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, 1.0])
    draws = 1500
    for temperature in (1.0, 0.6):
        rows = [make_row(seed=11, output=[0] * i, temperature=temperature) for i in range(500)]
        rows += [make_row(seed=i, temperature=temperature) for i in range(draws - 500)]
        counts = Counter(s.token for s in sample(logits.expand(draws, -1), rows))
        expected = (logits.double() / temperature).softmax(-1) * draws
        chi2 = sum((counts[i] - float(e)) ** 2 / float(e) for i, e in enumerate(expected))
        assert chi2 < 18.5, counts  # 4 degrees of freedom: one in a thousand is above


@pytest.mark.parametrize("vocab", [5, 3000, 17001])
@pytest.mark.parametrize("scale", [0.0, 0.5, 4.0])
@pytest.mark.parametrize("params", [{}, {"top_p": 0.6037}, {"top_k": 2500}])
def test_a_draw_inverts_the_cumulative_probability_in_descending_order(
    vocab: int, scale: float, params: dict[str, Any]
) -> None:
    # Rounded, so that there are many ties.
    logits = (make_logits(1, vocab, seed=6, scale=scale) * 8).round() / 8
    order = sorted(range(vocab), key=lambda i: (-float(logits[0, i]), i))
    ordered = logits[0, order].double()
    if "top_k" in params and params["top_k"] < vocab:
        ordered[ordered < ordered[params["top_k"] - 1]] = -INF
    cumulative = ordered.softmax(-1).cumsum(-1)
    kept = int((cumulative < params.get("top_p", 1.0)).sum())
    total = float(cumulative[min(kept, vocab - 1)])
    for seed in range(8):
        target = uniform(seed, 2) / 2**53 * total
        near = {order[int((cumulative <= target + slack).sum())] for slack in (-1e-9, 1e-9)}
        (got,) = sample(logits, [make_row(output=[0, 0], seed=seed, **params)])
        assert got.token in near


# -- isolation --
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("vocab", "counts"),
    [
        (128, range(1, 41)),
        (997, range(1, 41)),
        (33001, (1, 2, 7)),
        (32000, (1, 8)),
    ],
)
@pytest.mark.usefixtures("restored_threads")
def test_a_row_never_sees_the_others(threads: int, vocab: int, counts: Any) -> None:
    logits, rows = make_logits(max(counts), vocab, seed=1), mixed_rows(max(counts), vocab)
    torch.set_num_threads(1)
    alone = [sample(logits[i : i + 1].clone(), [row])[0] for i, row in enumerate(rows)]
    torch.set_num_threads(threads)
    for count in counts:
        # SampledToken compares floats to the bit.
        assert sample(logits[:count], rows[:count]) == alone[:count]
    shifted = torch.cat((logits[3:], torch.full((2, vocab), math.nan)))
    broken = [make_row(), make_row(temperature=0)]
    assert sample(shifted, [*rows[3:], *broken])[:-2] == alone[3:]
