"""One answer in the making, as the scheduler sees it."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..adapters.activation import Activation
from ..adapters.mix import BASE_IDENTITY, Mix
from ..outputs import FinishReason, TokenLogprobs
from ..sampling_params import SamplingParams


@dataclass(slots=True, eq=False)
class Sequence:
    """One answer in the making: tokens, progress, what it holds. The scheduler changes it."""

    seq_id: int
    request_id: str
    index: int  # which of the request's n
    params: SamplingParams
    prompt_ids: list[int]
    seed: int
    arrival: int  # order of arrival
    max_total: int  # prompt + output tokens at most
    mix: Mix = ()
    identity: bytes = BASE_IDENTITY  # of the mix, for the prefix cache
    stop_ids: frozenset[int] = frozenset()  # ids that end it, eos among them unless ignored
    bad_words: tuple[tuple[int, ...], ...] = ()  # whose last token may not follow the others
    adapter_start: int = 0  # token from which on the mix is active; those before are the base's
    output_ids: list[int] = field(default_factory=list)
    output_logprobs: list[TokenLogprobs] = field(default_factory=list)  # by token, if asked for
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)  # from position 1 on
    num_scheduled: int = 0  # tokens whose KV is computed or being computed
    num_computed: int = 0  # tokens whose KV is known to be in the cache
    num_pending: int = 0  # tokens that are being sampled, their values not yet known
    num_cached: int | None = None  # of those, from the prefix cache at the first admission
    num_overtaken: int = 0  # later ones that got an adapter slot when there was none for it
    blocks: list[int] = field(default_factory=list)
    request_slot: int | None = None  # while it runs
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    error: str | None = None  # why, when it ended with FinishReason.ERROR

    def activate(self, activation: Activation) -> None:
        """Says what computes it; before its first step."""
        self.mix, self.identity = activation.mix, activation.identity
        self.adapter_start = activation.start or 0

    @property
    def num_tokens(self) -> int:
        """Prompt and output tokens known so far."""
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def num_expected(self) -> int:
        """Tokens known so far and those that are being sampled."""
        return self.num_tokens + self.num_pending

    @property
    def in_flight(self) -> bool:
        """Whether a step in flight computes some of it."""
        return self.num_computed < self.num_scheduled

    def tokens(self, start: int, end: int) -> list[int]:
        """Tokens `start:end` of prompt + output."""
        cut = len(self.prompt_ids)
        if end <= cut:
            return self.prompt_ids[start:end]
        return self.prompt_ids[start:cut] + self.output_ids[max(start - cut, 0) : end - cut]

    @property
    def is_ending(self) -> bool:
        """Whether it has ended, or will when the tokens that are being sampled arrive."""
        count = len(self.output_ids) + self.num_pending
        return (
            self.finish_reason is not None
            or count == self.params.max_tokens
            or (self.num_pending > 0 and self.num_expected >= self.max_total)
        )

    def end_if_due(self) -> None:
        """Ends it if its last token does."""
        params, count, token = self.params, len(self.output_ids), self.output_ids[-1]
        if token in self.stop_ids and count >= params.min_tokens:
            self.stop_reason = token if token in (params.stop_token_ids or ()) else None
            self.finish_reason = FinishReason.STOP
        elif count == params.max_tokens or self.num_tokens >= self.max_total:
            self.finish_reason = FinishReason.LENGTH

    def rewind(self) -> None:
        """Back to its tokens, as if nothing of it had been computed and it held nothing."""
        del self.output_logprobs[len(self.output_ids) :]  # of a token that did not arrive
        self.num_scheduled = self.num_computed = self.num_pending = 0
        self.blocks, self.request_slot = [], None
        if self.output_ids and self.finish_reason is None:
            self.end_if_due()
