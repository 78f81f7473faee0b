"""What a sampler is: tokens from logits, started in one call and waited for in another.

There are two. `host` takes row by row and is exact to the bit; `device` takes all rows at once and
never looks at the host, so that the next step can be prepared before the tokens are known. Both
change logits by the same `logits_processors` and sample by the same random numbers.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from ..device.cpu import Fetch
from ..outputs import TokenLogprobs
from ..sampling_params import SamplingParams
from .logits_processors import LogitsProcessor
from .logprobs import LogprobsHandle, collect_logprobs
from .random_numbers import random_numbers, random_stream

GREEDY_BELOW = 1e-5
"""Temperatures under this mean greedy: dividing by them would only overflow."""


class SamplingState:
    """What a request's tokens depend on beside their logits; its request slot keeps it."""

    __slots__ = ("is_greedy", "params", "processors", "stream", "truncation")

    def __init__(
        self, params: SamplingParams, seed: int, processors: Sequence[LogitsProcessor]
    ) -> None:
        self.params, self.processors = params, processors
        self.stream = random_stream(seed)
        self.is_greedy = params.temperature < GREEDY_BELOW
        log_min_p = math.log(params.min_p) if params.min_p > 0 else -math.inf
        # In the order of `mk.draw`; a top_k that is not positive keeps all.
        self.truncation = params.temperature, params.top_k, params.top_p, log_min_p


@dataclass(frozen=True, slots=True)
class SamplingRows:
    """The rows of logits that give a token in a step, as columns."""

    states: Sequence[SamplingState]
    request_slots: np.ndarray  # int64 [rows]
    positions: np.ndarray  # int64 [rows], output tokens of the request before this one

    def __len__(self) -> int:
        return len(self.states)

    def processors(self) -> dict[int, list[LogitsProcessor]]:
        """Of each row those that change its logits; rows without any are left out."""
        found = {
            i: [p for p in state.processors if p.is_active(int(self.positions[i]))]
            for i, state in enumerate(self.states)
            if state.processors
        }
        return {i: processors for i, processors in found.items() if processors}

    def logprobs(self) -> dict[int, int]:
        """How many of the likeliest tokens each row wants to know; most want none."""
        wanted = [state.params.num_logprobs for state in self.states]
        return {i: top for i, top in enumerate(wanted) if top is not None}

    def update(self, tokens: Tensor) -> None:
        """Tells the processors what was sampled: int64 [rows] on their device."""
        for i, state in enumerate(self.states):
            for processor in state.processors:
                processor.update(tokens[i : i + 1])

    def random(self, places: Sequence[int], vocab: int) -> RandomRows:
        """What samples the rows at these places at random, on the host."""
        states = [self.states[i] for i in places]
        columns = np.array([state.truncation for state in states], np.float64).T.copy()
        temperature, top_k, top_p, log_min_p = map(torch.from_numpy, columns)
        streams = np.array([state.stream for state in states], np.uint64)
        numbers = random_numbers(streams, self.positions[places])
        return RandomRows(
            rows=torch.tensor(places),
            temperature=temperature.float(),
            top_k=torch.where((top_k > 0) & (top_k < vocab), top_k, vocab).long(),
            top_p=top_p,
            log_min_p=log_min_p,
            numbers=torch.from_numpy(numbers),
        )


class SampleError(enum.IntEnum):
    """Why a row has no token, as a number that a device can hold."""

    NONE = 0
    NOT_FINITE = 1
    NO_TOKEN = 2
    OVERFLOW = 3


MESSAGES: dict[int, str | None] = {
    SampleError.NONE: None,
    SampleError.NOT_FINITE: (
        "logits are not finite (NaN or infinity): the weights of the model or of the adapter are "
        "broken, or too large for its dtype"
    ),
    SampleError.NO_TOKEN: (
        "no token is possible: allowed_token_ids, bad_words, logit_bias, min_tokens and "
        "logits_processors leave none"
    ),
    SampleError.OVERFLOW: (
        "logits overflow: repetition_penalty or temperature takes them beyond fp32; bring it "
        "nearer to 1"
    ),
}


@dataclass(frozen=True, slots=True)
class SampledToken:
    """The token of one row, or why there is none."""

    token: int | None
    logprobs: TokenLogprobs | None
    error: str | None


class RandomRows(NamedTuple):
    """The rows that are sampled at random in one way; after the first what `mk.draw` takes."""

    rows: Tensor  # int64 [n], their places among all rows
    temperature: Tensor  # fp32 [n]
    top_k: Tensor  # int64 [n], from 1 to the vocabulary
    top_p: Tensor  # fp64 [n]
    log_min_p: Tensor  # fp64 [n]
    numbers: Tensor  # int64 [n], random, below 2**53


class SamplingTensors(NamedTuple):
    """What a sampler needs from the host in a step; a part that no row needs is None."""

    request_slots: Tensor  # int64 [rows]
    small_top_k: RandomRows | None
    any_top_k: RandomRows | None
    logprob_rows: Tensor | None  # int64, the rows that want log probabilities, if not all do


@dataclass(frozen=True, slots=True)
class SampleHandle:
    """Tokens in flight to the host."""

    results: Fetch  # int64 [rows] tokens, 0 where there is none, and int64 [rows] SampleErrors
    logprobs: LogprobsHandle | None  # of the rows that want them
    rows: SamplingRows


class Sampler(Protocol):
    """Takes one token from each row of logits."""

    def prepare(self, rows: SamplingRows) -> SamplingTensors | None:
        """What is to be sent to the device for these rows before they are launched."""

    def token_ids(self, ids: Tensor, request_slots: Tensor) -> Tensor:
        """The ids of a step's tokens, int64 [tokens], those filled in that only the device knows.

        Such a token is the last one sampled for its request slot; the others have slot -1.
        """

    def launch(
        self,
        logits: Tensor,  # [rows, vocab], any float dtype
        rows: SamplingRows,
        tensors: SamplingTensors | None,  # what `prepare` gave for them, on the device
    ) -> SampleHandle:
        """Starts to sample. The logits stay as they are, but may change when it has returned."""

    def collect(self, handle: SampleHandle) -> list[SampledToken]:
        """Waits for the tokens, in the order of the rows.

        Log probabilities are of the model's own distribution: before bias, penalties, temperature.
        """
        tokens, errors = (part.tolist() for part in handle.results.wait())
        wanted = handle.rows.logprobs()
        found = [] if handle.logprobs is None else collect_logprobs(handle.logprobs)
        logprobs = dict(zip(wanted, found, strict=True))
        return [
            SampledToken(None, None, MESSAGES[error])
            if error
            else SampledToken(token, logprobs.get(i), None)
            for i, (token, error) in enumerate(zip(tokens, errors, strict=True))
        ]

    def profile(self, logits: Tensor) -> None:
        """Takes as much memory as sampling from such logits [rows, vocab] can need."""
