"""In which order waiting sequences are considered. A new policy is a class and a name below."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from ..errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence as Items

    from .sequence import Sequence


@dataclass(frozen=True, slots=True)
class View:
    """What a policy may look at, and must not change."""

    running: Items[Sequence]
    num_free_blocks: int


class Policy(Protocol):
    """The order of admission."""

    def order(self, waiting: Items[Sequence], view: View) -> list[Sequence]:
        """The sequences to consider, best first; one left out waits for a later step."""


def by_arrival(seq: Sequence) -> tuple[int, int]:
    """Sort key: order of arrival, then of the answers to one request."""
    return seq.arrival, seq.seq_id


class Fcfs:
    """First come, first served; a preempted sequence keeps its place, and so comes first."""

    def order(self, waiting: Items[Sequence], view: View) -> list[Sequence]:
        """All of them by arrival."""
        return sorted(waiting, key=by_arrival)


POLICIES: dict[str, Policy] = {"fcfs": Fcfs()}


def policy_named(name: str) -> Policy:
    """The policy of that name, or a ConfigError that lists the known ones."""
    try:
        return POLICIES[name]
    except KeyError:
        known = ", ".join(sorted(POLICIES))
        raise ConfigError(f"unknown policy {name!r}; known policies: {known}") from None
