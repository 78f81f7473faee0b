"""What comes back: log probabilities, answers, and why they ended."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass


class FinishReason(str, enum.Enum):
    """Why a sequence ended; the values are OpenAI's."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Logprob:
    """One candidate at one position."""

    logprob: float
    rank: int  # 1 = most likely


TokenLogprobs = dict[int, Logprob]
"""Token id -> logprob, the chosen token always among them."""


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One of the `n` answers to a request."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    logprobs: list[TokenLogprobs] | None
    finish_reason: str | None  # None while it runs
    stop_reason: int | str | None  # the stop id or string that ended it


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """All that is known of a request after a step; cumulative."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[TokenLogprobs | None] | None  # None at position 0
    outputs: list[CompletionOutput]
    finished: bool
    num_cached_tokens: int  # prompt tokens taken from the prefix cache
    adapter: str | Mapping[str, float] | None  # as the user named it
    error: str | None = None  # why an answer ended with finish_reason "error"
