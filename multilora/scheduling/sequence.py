"""One answer in the making, as the scheduler sees it."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..adapters.mix import Mix
from ..outputs import FinishReason
from ..sampling_params import SamplingParams


@dataclass(slots=True, eq=False)
class Sequence:
    """One answer in the making: tokens, progress, what it holds. The scheduler changes it."""

    seq_id: int
    request_id: str
    index: int  # which of the request's n
    params: SamplingParams
    prompt_ids: list[int]
    mix: Mix
    identity: bytes  # digest of the mix, for the prefix cache
    seed: int
    arrival: int  # order of arrival
    max_total: int  # prompt + output tokens at most
    stop_ids: frozenset[int] = frozenset()  # ids that end it, eos among them unless ignored
    output_ids: list[int] = field(default_factory=list)
    num_scheduled: int = 0  # tokens whose KV is computed or being computed
    num_computed: int = 0  # tokens whose KV is known to be in the cache
    num_pending: int = 0  # tokens that are being sampled, their values not yet known
    num_cached: int = 0  # of those, taken from the prefix cache at the first admission
    num_overtaken: int = 0  # later ones that got an adapter slot when there was none for it
    blocks: list[int] = field(default_factory=list)
    row: int | None = None  # the runner's row while it runs
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

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
        """Whether a plan that is not yet committed computes some of it."""
        return self.num_computed < self.num_scheduled

    def tokens(self, start: int, end: int) -> list[int]:
        """Tokens `start:end` of prompt + output."""
        cut = len(self.prompt_ids)
        if end <= cut:
            return self.prompt_ids[start:end]
        return self.prompt_ids[start:cut] + self.output_ids[max(start - cut, 0) : end - cut]
