"""In which order waiting sequences are considered. A new policy is a class and a name below.

A policy orders admission alone. It sees the waiting sequences, by arrival, and a `View`, and
returns some of the waiting ones, each once; it must not change them, and gives the same order for
the same state: a step may be done again. One that raises, or returns anything else, ends the
engine, not a request.
Whom a lack of blocks preempts is the scheduler's: the running sequence that came last.
"""

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

    def order(self, waiting: Items[Sequence], view: View) -> Items[Sequence]:
        """The sequences to consider, best first; one left out waits for a later step."""


def checked_order(policy: Policy, waiting: Items[Sequence], view: View) -> Items[Sequence]:
    """What the policy says. A ValueError, with its name, for what it must not say."""
    order = policy.order(waiting, view)
    if order is waiting:
        return order
    found = list(order)
    named = {id(seq) for seq in found}
    if len(named) < len(found) or not named <= {id(seq) for seq in waiting}:
        name = type(policy).__name__
        raise ValueError(f"policy {name} must order the waiting sequences, each at most once")
    return found


def by_arrival(seq: Sequence) -> tuple[int, int]:
    """Sort key: order of arrival, then of the answers to one request."""
    return seq.arrival, seq.seq_id


class Fcfs:
    """First come, first served; a preempted sequence keeps its place, and so comes first."""

    def order(self, waiting: Items[Sequence], view: View) -> Items[Sequence]:
        """All of them by arrival, in which order they are given."""
        return waiting


POLICIES: dict[str, Policy] = {"fcfs": Fcfs()}


def policy_named(name: str) -> Policy:
    """The policy of that name, or a ConfigError that lists the known ones."""
    try:
        return POLICIES[name]
    except KeyError:
        known = ", ".join(sorted(POLICIES))
        raise ConfigError(f"unknown policy {name!r}; known policies: {known}") from None
