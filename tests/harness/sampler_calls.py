"""Requests in the middle of an answer, and what the two samplers make of their logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from multilora.device.cpu import Device
from multilora.device.input_buffer import InputBuffer
from multilora.sampling.device import DeviceSampler
from multilora.sampling.host import HostSampler
from multilora.sampling.logits_processors import logits_processors
from multilora.sampling.sampler import SamplingRows, SamplingState

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

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
