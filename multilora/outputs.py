"""What comes back: log probabilities, answers, and why they ended."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from .lora_request import LoRARequest


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
    rank: int | None  # 1 = most likely
    decoded_token: str | None = None  # its text by itself; None without a tokenizer


TokenLogprobs = dict[int, Logprob]
"""Token id -> logprob, the chosen token always among them."""


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One of the `n` answers to a request, or with `RequestOutputKind.DELTA` what is new of it."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    logprobs: list[TokenLogprobs] | None
    finish_reason: str | None  # None while it runs
    stop_reason: int | str | None  # the stop id or string that ended it
    token_offset: int = 0  # tokens of the answer before `token_ids`: those of earlier deltas

    def finished(self) -> bool:
        """Whether the answer has ended."""
        return self.finish_reason is not None


class RequestMetrics(NamedTuple):
    """When what happened to a request; the names are vLLM's.

    `arrival_time` is in seconds since 1970. The others are of a clock that begins anywhere and
    never jumps (`time.monotonic`), 0 for what has not happened yet.
    """

    arrival_time: float
    queued_ts: float  # when it came
    scheduled_ts: float = 0.0  # when its first step began: it waited in the queue until then
    first_token_ts: float = 0.0
    last_token_ts: float = 0.0
    num_generation_tokens: int = 0
    adapter_ready_ts: float = 0.0  # when its adapters were loaded; as a rule when it came

    @property
    def adapter_wait(self) -> float:
        """Seconds for which it waited for its adapters to be loaded; 0 before they are."""
        return max(self.adapter_ready_ts - self.queued_ts, 0.0)

    @property
    def first_token_latency(self) -> float:
        """Seconds from its arrival to its first token; 0 before it."""
        return max(self.first_token_ts - self.queued_ts, 0.0)


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """What is known of a request after a step: all, or with DELTA what is new of its answers."""

    request_id: str
    prompt: str | None  # its text, if it was one
    prompt_token_ids: list[int]
    # None at position 0. With DELTA they are in the first output; [] in the others.
    prompt_logprobs: list[TokenLogprobs | None] | None
    outputs: list[CompletionOutput]
    finished: bool
    num_cached_tokens: int  # prompt tokens taken from the prefix cache
    adapter: str | Mapping[str, float] | None  # as the user named it
    adapter_start: int | None = None  # prompt token from which on it is active; None = the base
    error: str | None = None  # why an answer ended with finish_reason "error"
    metrics: RequestMetrics | None = None
    lora_request: LoRARequest | None = None  # what `LLM` was asked for
