"""Finds the request that a step fails for: all of them again, then in halves, each alone twice.

Trials are steps of their own: while one lasts, nobody else runs. Its members have passed when they
have come as far as they were when the step failed. Pure: it knows sequence ids and token counts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(slots=True)
class _Split:
    """Two halves of what failed as a whole."""

    num_open: int = 2
    is_clean: bool = True  # neither half has failed


@dataclass(slots=True)
class _Trial:
    members: dict[int, int]  # seq_id -> tokens to compute
    num_failures: int
    split: _Split | None = None


class FailureIsolation:
    """The trials to come; the last one of the list is on."""

    def __init__(self) -> None:
        self._trials: list[_Trial] = []

    @property
    def members(self) -> frozenset[int] | None:
        """The sequences that alone may run, or None for all."""
        return frozenset(self._trials[-1].members) if self._trials else None

    def failed(self, involved: dict[int, int]) -> frozenset[int]:
        """A step with these failed; the sequence that has now failed alone twice, if there is one.

        `involved` says for each sequence how many tokens it would have had computed.
        """
        trial = _Trial(involved, 0)
        if self._trials and involved.keys() <= self._trials[-1].members.keys():
            trial = self._trials.pop()
            self._put_off(trial, involved)
        trial.num_failures += 1
        if trial.split is not None:
            trial.split.is_clean = False
        if len(trial.members) == 1:
            if trial.num_failures < 2:
                self._trials.append(trial)
                return frozenset()
            self._close(trial)
            return frozenset(trial.members)
        if trial.num_failures < 2 and trial.split is None:
            self._trials.append(trial)
        else:
            self._halve(trial)
        return frozenset()

    def settle(self, position: Callable[[int], int | None]) -> bool:
        """Ends trials that were passed; True if what failed as a whole passed in halves.

        `position` gives the computed tokens of a sequence, None when it has ended.
        """
        only_the_whole = False
        while self._trials:
            trial = self._trials[-1]
            trial.members = {
                seq_id: tokens
                for seq_id, tokens in trial.members.items()
                if (computed := position(seq_id)) is not None and computed < tokens
            }
            if trial.members:
                break
            self._trials.pop()
            only_the_whole |= self._close(trial)
        return only_the_whole

    def release(self) -> None:
        """Gives all trials up: their members cannot run alone."""
        self._trials.clear()

    def _put_off(self, trial: _Trial, involved: dict[int, int]) -> None:
        """Leaves those that were not in the failed step for a trial of their own."""
        others = {i: tokens for i, tokens in trial.members.items() if i not in involved}
        if others:
            self._trials.append(_Trial(others, 0, trial.split))
            if trial.split is not None:
                trial.split.num_open += 1
        trial.members = {i: trial.members[i] for i in involved}

    def _halve(self, trial: _Trial) -> None:
        self._close(trial)
        ids, split = list(trial.members), _Split()
        for half in (ids[len(ids) // 2 :], ids[: len(ids) // 2]):
            self._trials.append(_Trial({i: trial.members[i] for i in half}, 0, split))

    def _close(self, trial: _Trial) -> bool:
        """Whether with it all that failed as a whole has passed in halves."""
        if trial.split is None:
            return False
        trial.split.num_open -= 1
        return trial.split.num_open == 0 and trial.split.is_clean
