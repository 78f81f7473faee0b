"""What one engine step computes, and its result: plain data between scheduler and runner."""

from __future__ import annotations

from dataclasses import dataclass

from ..outputs import TokenLogprobs
from ..sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class NewSequence:
    """A sequence that takes a request slot in this step: all that the runner must know of it."""

    request_slot: int
    token_ids: list[int]  # prompt, and output so far when it was preempted
    num_prompt: int
    params: SamplingParams
    seed: int
    stop_ids: frozenset[int]
    bad_words: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class ScheduledChunk:
    """Tokens `start : start + count` of the sequence in `request_slot`, without values."""

    request_slot: int
    start: int
    count: int
    slot: int  # adapter table slot, -1 = base
    blocks: tuple[int, ...]  # KV blocks of the sequence, enough for start + count tokens
    samples: bool  # whether the last token's logits give a new token
    adapter_start: int = 0  # token of the sequence from which on `slot` counts; before it, the base

    @property
    def first_slot(self) -> int:
        """The adapter slot of its first token."""
        return self.slot if self.start >= self.adapter_start else -1


@dataclass(frozen=True, slots=True)
class SchedulerOutput:
    """One step."""

    new_sequences: tuple[NewSequence, ...]
    chunks: tuple[ScheduledChunk, ...]
    freed_request_slots: tuple[int, ...]  # whose sequence left since the last step

    @property
    def num_tokens(self) -> int:
        """Tokens that the step computes."""
        return sum(chunk.count for chunk in self.chunks)


@dataclass(frozen=True, slots=True)
class ChunkResult:
    """The result of one chunk."""

    request_slot: int
    token: int | None  # the sampled token, None when the chunk sampled none
    logprobs: TokenLogprobs | None
    prompt_logprobs: list[TokenLogprobs] | None  # of prompt positions start + 1 ..
    error: str | None = None  # why it gave no token: the request must end with it


@dataclass(frozen=True, slots=True)
class StepResult:
    """The results of a step, in the order of its chunks."""

    chunks: tuple[ChunkResult, ...]
