"""The sampler that takes row by row: exact, and done when it has been launched.

A row's result depends on that row alone, to the bit. Over many rows at once only exact operations
run (argmax, comparisons); whatever rounds (softmax, penalties, division) runs on one row's own
[vocab] vector, so neither the neighbours nor their number can change it. Cumulative probabilities
are integers: their sums are exact in any order, on any device, with any number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

import multilora_kernels as mk

from ..device.cpu import Device
from .logprobs import launch_logprobs
from .sampler import (
    SampleError,
    SampleHandle,
    Sampler,
    SamplingRows,
    SamplingTensors,
)

_Sampled = tuple[int, SampleError]  # a token, 0 with an error


class HostSampler(Sampler):
    """Knows every token before the next step is prepared; needs nothing sent."""

    def __init__(self, device: Device) -> None:
        self._device = device

    def prepare(self, rows: SamplingRows) -> SamplingTensors | None:
        """Nothing."""
        return None

    def token_ids(self, ids: Tensor, request_slots: Tensor) -> Tensor:
        """The ids: the host knows them all."""
        return ids

    def launch(
        self, logits: Tensor, rows: SamplingRows, tensors: SamplingTensors | None
    ) -> SampleHandle:
        """Samples."""
        found = _sample(logits, rows)
        tokens = torch.tensor([token for token, _ in found], device=logits.device)
        errors = torch.tensor([int(error) for _, error in found])
        rows.update(tokens)
        logprobs, wanted = None, rows.logprobs()
        if wanted:
            own = slice(None) if len(wanted) == len(rows) else list(wanted)
            tops = list(wanted.values())
            logprobs = launch_logprobs(self._device, logits[own], tokens[own], tops)
        return SampleHandle(self._device.fetch([tokens, errors]), logprobs, rows)

    def profile(self, logits: Tensor) -> None:
        """It needs a few rows of one vocabulary."""


def _sample(logits: Tensor, rows: SamplingRows) -> list[_Sampled]:
    """The token of each row of [rows, vocab] logits."""
    # max finds NaN first, then +inf, and -inf only where nothing is finite; and the lowest id.
    values, best = logits.max(-1, keepdim=True)
    likeliest = torch.cat((best, values.isfinite().to(best.dtype)), -1).tolist()
    found: list[_Sampled] = [
        (token, SampleError.NONE) if is_finite else (0, SampleError.NOT_FINITE)
        for token, is_finite in likeliest
    ]
    processors = rows.processors()
    random: list[int] = []  # rows that are sampled from the model's own logits
    processed: dict[int, Tensor] = {}  # and those whose own have changed
    for i, state in enumerate(rows.states):
        if found[i][1]:
            continue
        if i in processors:
            changed = logits[i].to(torch.float32, copy=True)
            for processor in processors[i]:
                processor.apply_(changed)
            found[i] = _greedy(changed)
            if not state.is_greedy and not found[i][1]:
                processed[i] = changed
        elif not state.is_greedy:
            random.append(i)
    if random:
        own = logits if len(random) == len(logits) else logits[random]
        _sample_at_random(own, rows, random, found)
    if processed:
        _sample_at_random(torch.stack(list(processed.values())), rows, list(processed), found)
    return found


def _greedy(logits: Tensor) -> _Sampled:
    """The lowest id of the largest of processed logits [vocab]."""
    value, best = logits.max(-1)
    if float(value) == -math.inf:
        return 0, SampleError.NO_TOKEN
    return (int(best), SampleError.NONE) if value.isfinite() else (0, SampleError.OVERFLOW)


def _sample_at_random(
    logits: Tensor,  # [len(places), vocab], of each row the largest is finite
    rows: SamplingRows,
    places: Sequence[int],
    found: list[_Sampled],
) -> None:
    """Puts a random token into `found` at each of the places."""
    each = rows.random(places, logits.shape[1])[1:]
    sampled = torch.stack(mk.draw(logits, *(part.to(logits.device) for part in each)))
    for i, token, failed in zip(places, *sampled.tolist(), strict=True):
        found[i] = (0, SampleError.OVERFLOW) if failed else (token, SampleError.NONE)
