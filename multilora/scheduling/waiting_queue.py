"""The waiting sequences, by arrival."""

from __future__ import annotations

from bisect import insort
from collections import Counter
from typing import TYPE_CHECKING

from .policies import by_arrival

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

    from ..adapters.mix import Mix
    from .sequence import Sequence


class WaitingQueue:
    """Sequences in order of arrival, and for which mixes any of them waits."""

    def __init__(self, seqs: Iterable[Sequence] = ()) -> None:
        self._seqs = sorted(seqs, key=by_arrival)
        self._mixes = Counter(seq.mix for seq in self._seqs)

    def add(self, seq: Sequence) -> None:
        """Puts a sequence in its place; as a rule that is the end."""
        self._mixes[seq.mix] += 1
        if not self._seqs or by_arrival(self._seqs[-1]) < by_arrival(seq):
            self._seqs.append(seq)
        else:
            insort(self._seqs, seq, key=by_arrival)

    def remove(self, seq: Sequence) -> None:
        """Takes out a sequence that is there."""
        self._seqs.remove(seq)
        self._mixes[seq.mix] -= 1
        if not self._mixes[seq.mix]:
            del self._mixes[seq.mix]

    @property
    def mixes(self) -> Collection[Mix]:
        """Each mix that a sequence waits for; () is the base."""
        return self._mixes.keys()

    def has_any(self, mixes: Collection[Mix] | None) -> bool:
        """Whether any waits for one of these or for the base; None = for whichever."""
        if mixes is None or () in self._mixes:
            return bool(self._seqs)
        return any(mix in self._mixes for mix in mixes)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._seqs)

    def __len__(self) -> int:
        return len(self._seqs)

    def __contains__(self, seq: object) -> bool:
        return seq in self._seqs

    def check_integrity(self) -> None:
        """Asserts that it is in order and counts right."""
        assert self._seqs == sorted(self._seqs, key=by_arrival), "the queue is out of order"
        assert self._mixes == Counter(seq.mix for seq in self._seqs), "waiting mixes differ"
