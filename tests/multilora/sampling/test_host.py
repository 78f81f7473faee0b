"""Choosing tokens. Oracles: transformers' logits processors, and log_softmax in float64."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from multilora.device.cpu import Device
from multilora.outputs import TokenLogprobs
from multilora.sampling.logprobs import collect_logprobs, launch_logprobs
from multilora.sampling.random_numbers import random_numbers, random_stream
from multilora.sampling.sampler import MESSAGES, SampledToken, SampleError
from multilora.sampling_params import SamplingParams
from tests.harness.sampler_calls import Request, sample

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

INF = math.inf


def make_row(
    prompt: list[int] | None = None,
    output: list[int] | None = None,
    seed: int = 7,
    stop: frozenset[int] = frozenset(),
    **params: Any,
) -> Request:
    return Request(SamplingParams(**params), seed, prompt or [], output or [], stop)


def uniform(seed: int, position: int) -> int:
    streams = np.array([random_stream(seed)], np.uint64)
    return int(random_numbers(streams, np.array([position]))[0])


def token_logprobs(logits: Tensor, targets: list[int], top: int) -> list[TokenLogprobs]:
    chosen = torch.tensor(targets, dtype=torch.int64)
    rows = logits[: len(targets)]
    return collect_logprobs(launch_logprobs(Device(), rows, chosen, [top] * len(targets)))


def failed(error: SampleError) -> SampledToken:
    return SampledToken(None, None, MESSAGES[error])


def make_logits(rows: int, vocab: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, vocab, generator=generator) * scale


def reachable(logits: Tensor, draws: int = 600, **params: Any) -> set[int]:
    """The tokens that many draws from one row of logits [vocab] give."""
    rows = [make_row(seed=i, **params) for i in range(draws)]
    return {s.token for s in sample(logits.expand(draws, -1), rows)}


def surviving(scores: Tensor) -> set[int]:
    return set(scores[0].isfinite().nonzero().flatten().tolist())


def mixed_rows(count: int, vocab: int) -> list[Request]:
    """Rows with every kind of setting, each kind at odd and even indices."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 0, "logprobs": 3},
        {"temperature": 0.9, "logprobs": 2},
        {"temperature": 1.3, "top_k": 40, "top_p": 0.9},
        {"temperature": 0, "repetition_penalty": 1.3, "presence_penalty": 0.5},
        {"temperature": 0.7, "min_p": 0.05, "frequency_penalty": 0.3, "logprobs": 0},
        {"temperature": 1.0, "logit_bias": {3: 4.0, vocab - 1: 4.0}},
        {"temperature": 0},
    ]
    return [
        make_row([1, 2, i], [4, 4, 5][: i % 4], seed=i, **kinds[i % len(kinds)])
        for i in range(count)
    ]


@pytest.fixture
def restored_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


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


# -- log probabilities --


def test_each_row_gets_as_many_logprobs_as_it_wants() -> None:
    logits, tops = make_logits(4, 50), [3, 0, 7, 1]
    handle = launch_logprobs(Device(), logits, torch.tensor([1, 2, 3, 4]), tops)
    expected = [token_logprobs(logits[i : i + 1], [1 + i], top)[0] for i, top in enumerate(tops)]
    assert collect_logprobs(handle) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprobs_agree_with_float64(dtype: torch.dtype) -> None:
    logits = make_logits(16, 997).to(dtype)
    targets = [i * 83 % 997 for i in range(9)]
    exact = logits.double().log_softmax(-1)
    for i, entry in enumerate(token_logprobs(logits, targets, 5)):
        likeliest = logits[i].double().sort(descending=True, stable=True).indices[:5].tolist()
        assert list(entry) == list(dict.fromkeys([targets[i], *likeliest]))
        for token, found in entry.items():
            assert found.logprob == pytest.approx(float(exact[i, token]), abs=2e-6)
            assert found.rank == 1 + int((logits[i] > logits[i, token]).sum())


def test_sampled_logprobs_are_of_the_raw_distribution() -> None:
    logits = make_logits(1, 50)
    second = int(logits[0].topk(2).indices[1])
    row = make_row(temperature=0.3, top_k=1, logit_bias={second: 50.0}, logprobs=4)
    (got,) = sample(logits, [row])
    assert got.token == second
    assert got.logprobs == token_logprobs(logits, [second], 4)[0]
    assert got.logprobs[second].rank == 2


def test_zero_logprobs_give_the_chosen_token_only() -> None:
    (got,) = sample(make_logits(1, 50), [make_row(logprobs=0)])
    assert got.logprobs is not None
    assert list(got.logprobs) == [got.token]


def test_tied_logits_share_a_rank_and_the_lowest_ids_are_listed() -> None:
    logits = torch.tensor([[0.0, 1.0, 0.0, 0.0, 1.0, 0.0]])
    (entry,) = token_logprobs(logits, [5], 3)
    assert {token: found.rank for token, found in entry.items()} == {5: 3, 1: 1, 4: 1, 0: 3}


def test_more_logprobs_than_tokens_give_them_all() -> None:
    assert sorted(token_logprobs(torch.zeros(1, 3), [2], 20)[0]) == [0, 1, 2]


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


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("vocab", [128, 997, 32000])
@pytest.mark.usefixtures("restored_threads")
def test_prompt_logprobs_never_see_other_rows(threads: int, vocab: int) -> None:
    logits = make_logits(21, vocab, seed=2)
    targets = list(range(21))
    torch.set_num_threads(1)
    alone = [token_logprobs(logits[i : i + 1].clone(), [i], 2)[0] for i in targets]
    torch.set_num_threads(threads)
    for count in (1, 2, 16, 17, 21):
        assert token_logprobs(logits[:count], targets[:count], 2) == alone[:count]
    assert token_logprobs(logits.flip(0), targets[::-1], 2) == alone[::-1]
