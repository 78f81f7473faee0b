"""The sampler that never looks at the host against the one that does, row by row."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from multilora.device.cpu import Device
from multilora.device.cpu_graph import CpuGraph
from multilora.device.input_buffer import InputBuffer
from multilora.sampling.device import DeviceSampler
from multilora.sampling.sampler import MESSAGES, SampledToken, SampleError
from multilora.sampling_params import SamplingParams
from tests.harness.sampler_calls import (
    VOCAB,
    DeviceSampling,
    Request,
    random_request,
    rows_of,
    sample,
    sample_on_device,
)

CPU = Device()


def both(
    logits: torch.Tensor, requests: list[Request]
) -> tuple[list[SampledToken], list[SampledToken]]:
    """What the two samplers make of each row."""
    return sample_on_device(CPU, logits, requests), sample(logits, requests)


@pytest.mark.seconds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_samples_the_same_tokens(dtype: torch.dtype) -> None:
    draw = random.Random(1)
    for _ in range(40):
        rows = [random_request(draw) for _ in range(16)]
        logits = (torch.randn(16, VOCAB) * draw.choice((0.5, 3, 10))).to(dtype)
        ours, theirs = both(logits, rows)
        assert ours == theirs


def test_equal_logits_are_taken_by_their_ids() -> None:
    draw = random.Random(2)
    rows = [random_request(draw) for _ in range(64)]
    ours, theirs = both(torch.randint(0, 3, (64, VOCAB)).float(), rows)
    assert ours == theirs


@pytest.mark.parametrize("kinds", [2, 30, 400])
def test_a_small_top_k_counts_what_equals_its_last(kinds: int) -> None:
    """Many more tokens may stay than top_k says: ties with the last are no worse."""
    draw = random.Random(5)
    rows = [
        Request(
            SamplingParams(
                temperature=draw.choice((0.5, 1.0)),
                top_k=draw.choice((1, 2, 50, 1023)),
                top_p=draw.choice((0.05, 0.5, 0.97, 1.0)),
                min_p=draw.choice((0.0, 0.0, 0.4)),
            ),
            draw.getrandbits(60),
            [1],
            [2] * draw.randrange(9),
            frozenset(),
        )
        for _ in range(200)
    ]
    logits = torch.randint(-kinds // 2, kinds // 2 + 1, (200, VOCAB)) / 40
    ours, theirs = both(logits, rows)
    assert ours == theirs


def test_a_small_top_k_sorts_no_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    widths: list[int] = []
    sort = torch.Tensor.sort

    def watched(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        widths.append(self.shape[-1])
        return sort(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "sort", watched)
    request = Request(SamplingParams(top_k=40), 5, [1], [], frozenset())
    sample_on_device(CPU, torch.randn(1, VOCAB), [request])
    assert widths
    assert max(widths) < VOCAB


TRUNCATIONS = [{"temperature": 0}, {}, {"top_k": 20}]  # greedy, and the two ways of sampling
truncations = pytest.mark.parametrize("truncation", TRUNCATIONS, ids=str)


def check_one_fails(
    logits: torch.Tensor, params: dict[str, Any], error: SampleError, others: dict[str, Any]
) -> None:
    """Row 1 of three fails for this reason in both samplers, whatever its neighbours ask for."""
    requests = [
        Request(SamplingParams(**fields), 5, [1], [], frozenset((2, 3)))
        for fields in (others, params, others)
    ]
    for found in both(logits, requests):
        assert found[1] == SampledToken(None, None, MESSAGES[error])
        assert [s.error for s in found] == [None, MESSAGES[error], None]
        assert found[0].token is not None
        assert found[2].token is not None
    ours, theirs = both(logits, requests)
    assert ours == theirs


@truncations
@pytest.mark.parametrize("others", TRUNCATIONS, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_row_of_broken_logits_fails_alone(
    bad: float, truncation: dict[str, Any], others: dict[str, Any]
) -> None:
    logits = torch.randn(3, VOCAB)
    logits[1, 4 if bad != -float("inf") else slice(None)] = bad
    check_one_fails(logits, truncation, SampleError.NOT_FINITE, others)
    masked = {**truncation, "allowed_token_ids": [2, 3], "min_tokens": 1}
    check_one_fails(logits, masked, SampleError.NOT_FINITE, others)  # the first reason counts


@truncations
@pytest.mark.parametrize("others", TRUNCATIONS, ids=str)
def test_a_row_whose_settings_leave_no_token_fails_alone(
    truncation: dict[str, Any], others: dict[str, Any]
) -> None:
    masked = {**truncation, "allowed_token_ids": [2, 3], "min_tokens": 1, "logprobs": 1}
    check_one_fails(torch.randn(3, VOCAB), masked, SampleError.NO_TOKEN, others)


@truncations
@pytest.mark.parametrize("others", TRUNCATIONS, ids=str)
def test_a_row_that_a_penalty_takes_beyond_fp32_fails_alone(
    truncation: dict[str, Any], others: dict[str, Any]
) -> None:
    logits = torch.randn(3, VOCAB)
    logits[1, 1] = 1e38  # of the prompt
    penalty = {**truncation, "repetition_penalty": 1e-3}
    check_one_fails(logits, penalty, SampleError.OVERFLOW, others)


@pytest.mark.parametrize("top_k", [0, 20])
@pytest.mark.parametrize("others", TRUNCATIONS, ids=str)
def test_a_row_that_the_temperature_takes_beyond_fp32_fails_alone(
    top_k: int, others: dict[str, Any]
) -> None:
    """The one error that only sampling at random itself can find."""
    logits = torch.randn(3, VOCAB)
    logits[1] *= 1e36
    tiny = {"temperature": 1e-4, "top_k": top_k}
    check_one_fails(logits, tiny, SampleError.OVERFLOW, others)


def test_the_reasons_to_fail_are_told_apart() -> None:
    assert MESSAGES[SampleError.NONE] is None
    found = {MESSAGES[error] for error in SampleError}
    assert len(found) == len(SampleError)
    assert str(MESSAGES[SampleError.NOT_FINITE]).startswith("logits are not finite")
    assert str(MESSAGES[SampleError.NO_TOKEN]).startswith("no token is possible")


def test_a_sampled_token_counts_for_the_next_one() -> None:
    params = SamplingParams(temperature=0, frequency_penalty=2.0, repetition_penalty=1.5)
    request = Request(params, 0, [7], [], frozenset())
    rows, device = rows_of([request], VOCAB, CPU.torch), DeviceSampling(CPU, 1, VOCAB)
    logits = torch.randn(1, VOCAB)
    for position in range(12):
        (found,) = device(logits, replace(rows, positions=np.array([position])))
        assert [found] == sample(logits, [request])
        assert found.token is not None
        request.output_ids.append(found.token)
    assert len(set(request.output_ids)) > 3


def test_it_knows_the_last_token_of_each_request_slot() -> None:
    logits, device = torch.randn(3, VOCAB), DeviceSampling(CPU, 8, VOCAB)
    request = Request(SamplingParams(temperature=0), 0, [7], [], frozenset())
    rows = rows_of([request] * 3, VOCAB, CPU.torch)
    device(logits, replace(rows, request_slots=np.array([5, 0, 2])))
    best = logits.argmax(-1).tolist()
    ids = device.sampler.token_ids(torch.tensor([9, 0, 11, 0]), torch.tensor([-1, 2, -1, 5]))
    assert ids.tolist() == [9, best[2], 11, best[0]]


@truncations
@pytest.mark.parametrize("others", TRUNCATIONS, ids=str)
def test_the_step_after_a_row_without_a_token_computes_token_0(
    truncation: dict[str, Any], others: dict[str, Any]
) -> None:
    logits, device = torch.randn(2, VOCAB), DeviceSampling(CPU, 2, VOCAB)
    logits[0, 4] = float("nan")
    requests = [
        Request(SamplingParams(**fields), 0, [7], [], frozenset())
        for fields in (truncation, others)
    ]
    assert device(logits, rows_of(requests, VOCAB, CPU.torch))[0].token is None
    ids = device.sampler.token_ids(torch.tensor([9]), torch.tensor([0]))
    assert ids.tolist() == [0]  # of the vocabulary, and the same in every run


def test_it_never_looks_at_the_host() -> None:
    draw = random.Random(3)
    rows = rows_of([random_request(draw) for _ in range(32)], VOCAB, CPU.torch)
    sampler = DeviceSampler(CPU, 32, VOCAB)
    sent = InputBuffer(CPU, 1 << 16).send(sampler.prepare(rows))
    logits = torch.randn(32, VOCAB)
    CpuGraph(lambda: sampler.launch(logits, rows, sent).results.wait()[0])  # refuses what does
