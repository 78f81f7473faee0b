"""Requests in the middle of an answer, and what the two samplers make of their logits."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from multilora.device.cpu import Device
from multilora.device.input_buffer import InputBuffer
from multilora.sampling.device import DeviceSampler
from multilora.sampling.host import HostSampler
from multilora.sampling.logits_processors import logits_processors
from multilora.sampling.logprobs import collect_logprobs, launch_logprobs
from multilora.sampling.sampler import (
    MESSAGES,
    SampledToken,
    SampleError,
    SamplingRows,
    SamplingState,
)
from multilora.sampling_params import SamplingParams

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import Tensor

    from multilora.outputs import TokenLogprobs
    from multilora.sampling.sampler import SampledToken
    from multilora.sampling_params import SamplingParams


@dataclass(frozen=True)
class Request:
    """All that a request's next token depends on, next to its logits."""

    params: SamplingParams
    seed: int
    prompt_ids: list[int]
    output_ids: list[int]
    stop_ids: frozenset[int]

    def state(self, vocab: int, device: torch.device) -> SamplingState:
        """As its request slot has it."""
        processors = logits_processors(
            self.params, self.prompt_ids, self.output_ids, self.stop_ids, vocab, device
        )
        return SamplingState(self.params, self.seed, processors)


def rows_of(requests: Sequence[Request], vocab: int, device: torch.device) -> SamplingRows:
    """The requests in slots 0, 1, ..., with states of their own."""
    return SamplingRows(
        [request.state(vocab, device) for request in requests],
        np.arange(len(requests)),
        np.array([len(request.output_ids) for request in requests], np.int64),
    )


def sample(logits: torch.Tensor, requests: Sequence[Request]) -> list[SampledToken]:
    """The host's sampler, on [len(requests), vocab] logits."""
    sampler, rows = HostSampler(Device()), rows_of(requests, logits.shape[1], logits.device)
    assert sampler.prepare(rows) is None
    return sampler.collect(sampler.launch(logits, rows, None))


class DeviceSampling:
    """The device's sampler, and the buffer that sends what it needs."""

    def __init__(self, device: Device, request_slots: int, vocab: int) -> None:
        self.sampler = DeviceSampler(device, request_slots, vocab)
        self.buffer = InputBuffer(device, 1 << 18)

    def __call__(self, logits: torch.Tensor, rows: SamplingRows) -> list[SampledToken]:
        """The tokens of these rows."""
        sent = self.buffer.send(self.sampler.prepare(rows))
        return self.sampler.collect(self.sampler.launch(logits, rows, sent))


def sample_on_device(
    device: Device, logits: torch.Tensor, requests: Sequence[Request]
) -> list[SampledToken]:
    """The device's sampler, on [len(requests), vocab] logits there."""
    rows = rows_of(requests, logits.shape[1], logits.device)
    return DeviceSampling(device, len(rows), logits.shape[1])(logits, rows)


def make_row(
    prompt: list[int] | None = None,
    output: list[int] | None = None,
    seed: int = 7,
    stop: frozenset[int] = frozenset(),
    **params: Any,
) -> Request:
    return Request(SamplingParams(**params), seed, prompt or [], output or [], stop)


def failed(error: SampleError) -> SampledToken:
    return SampledToken(None, None, MESSAGES[error])


def make_logits(rows: int, vocab: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, vocab, generator=generator) * scale


def reachable(logits: Tensor, draws: int = 600, **params: Any) -> set[int]:
    """The tokens that many draws from one row of logits [vocab] give."""
    rows = [make_row(seed=i, **params) for i in range(draws)]
    return {s.token for s in sample(logits.expand(draws, -1), rows)}


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


VOCAB = 2000


def random_request(draw: random.Random) -> Request:
    """Any sampling parameters, each of them off in most rows."""

    def some(value: Any, off: Any) -> Any:
        return value if draw.random() < 0.3 else off

    params = SamplingParams(
        temperature=draw.choice((0.0, 0.3, 1.0, 2.0)),
        top_k=some(draw.choice((1, 7, 100, 1999)), 0),
        top_p=some(draw.choice((1e-6, 0.3, 0.9, 0.999)), 1.0),
        min_p=some(draw.choice((0.01, 0.5)), 0.0),
        repetition_penalty=some(draw.choice((0.5, 1.7)), 1.0),
        presence_penalty=some(draw.choice((-1.0, 1.5)), 0.0),
        frequency_penalty=some(draw.choice((-0.5, 0.7)), 0.0),
        logit_bias=some({3: 5.0, 11: -100.0}, None),
        allowed_token_ids=some(draw.sample(range(VOCAB), 40), None),
        min_tokens=some(4, 0),
    )
    prompt = [draw.randrange(VOCAB) for _ in range(5)]
    output = [draw.randrange(VOCAB) for _ in range(draw.randrange(8))]
    return Request(params, draw.getrandbits(60), prompt, output, frozenset((2, 3)))


def token_logprobs(logits: Tensor, targets: list[int], top: int) -> list[TokenLogprobs]:
    """Of each target its log probability, and the likeliest beside it."""
    chosen = torch.tensor(targets, dtype=torch.int64)
    rows = logits[: len(targets)]
    return collect_logprobs(launch_logprobs(Device(), rows, chosen, [top] * len(targets)))
