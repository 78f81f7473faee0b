"""What a peer is: it takes a batch of prompts with their adapters and times its tokens."""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from work import Work


class NotSupportedError(Exception):
    """The peer is there and cannot do this; the message says why."""


@dataclass
class Clock:
    """A batch on its way: the new tokens of each request and when they came."""

    tokens: list[list[int]]
    times: list[list[float]]
    start: float = field(default_factory=time.perf_counter)
    end: float = 0.0

    @classmethod
    def of(cls, requests: int) -> Clock:
        return cls([[] for _ in range(requests)], [[] for _ in range(requests)])

    def put(self, request: int, tokens: Sequence[int]) -> None:
        """Notes tokens that have just come."""
        self.times[request] += [time.perf_counter()] * len(tokens)
        self.tokens[request] += tokens

    def stop(self) -> Clock:
        self.end = time.perf_counter()
        return self

    def figures(self) -> dict[str, float | None]:
        """Seconds, tokens per second and the time to the first token.

        `decode` is the rate after the last of the first tokens, or None where most tokens came
        before it because requests were served one after another.
        """
        total = sum(map(len, self.tokens))
        first = [times[0] for times in self.times]
        late = sum(t > max(first) for times in self.times for t in times)
        return {
            "seconds": self.end - self.start,
            "rate": total / (self.end - self.start),
            "first_mean": sum(first) / len(first) - self.start,
            "first_last": max(first) - self.start,
            "decode": late / (self.end - max(first)) if late > total / 2 else None,
        }


class Peer(ABC):
    """An engine with the base and all adapters loaded. Making one may raise NotSupportedError."""

    def __init__(self, work: Work, precision: str, threads: int, settings: dict[str, Any]) -> None:
        self.work, self.precision, self.threads, self.settings = work, precision, threads, settings

    @staticmethod  # noqa: B027 - most peers read the files as they are
    def prepare(work: Work) -> None:
        """Writes the model in the peer's own format, where it has one."""

    @abstractmethod
    def run(self, prompts: list[list[int]], adapters: list[int | None], new: int) -> Clock:
        """`new` greedy tokens for each prompt, with its adapter (None = the base)."""

    def pid(self) -> int:
        """The process that computes."""
        return os.getpid()

    def close(self) -> None:  # noqa: B027 - most peers have nothing to end
        """Ends what the peer started."""
