"""What running sequences hold: KV blocks, a request slot, an adapter slot."""

from __future__ import annotations

import heapq
from collections.abc import Collection
from collections.abc import Sequence as Items
from typing import Protocol

from ..adapters.mix import Mix
from .block_pool import BlockPool
from .sequence import Sequence


class AdapterSlots(Protocol):
    """Who knows which mixes are loaded, and which have a slot of the adapter table."""

    def ready(self, mix: Mix) -> bool:
        """Whether the mix's weights are at hand; never waits."""

    def pin(self, mix: Mix) -> int | None:
        """The mix's slot, held until `unpin`; -1 for the base, None when there is no room now."""

    def unpin(self, mix: Mix) -> None:
        """Gives back one `pin`."""

    def resident(self) -> Collection[Mix] | None:
        """The only mixes that can be pinned now, beside the base; None if others may be, too."""


class Holdings:
    """Gives and takes back; `pool` and `adapters` are reset by whoever owns them."""

    def __init__(self, pool: BlockPool, adapters: AdapterSlots, max_num_seqs: int) -> None:
        self.pool, self.adapters = pool, adapters
        self._max_num_seqs = max_num_seqs
        self._free = list(range(max_num_seqs))  # request slots; a heap: low ones first
        self._freed: list[int] = []  # request slots, since `take_freed`
        self._adapter_slots: dict[int, int] = {}  # by request slot

    @property
    def has_request_slot(self) -> bool:
        """Whether one more sequence can run."""
        return bool(self._free)

    def adapter_slot(self, seq: Sequence) -> int:
        """The adapter slot of a running sequence."""
        assert seq.request_slot is not None
        return self._adapter_slots[seq.request_slot]

    def new_blocks(self, seq: Sequence, count: int) -> int:
        """Blocks that a sequence lacks to compute `count` more tokens."""
        return self.pool.blocks_for(seq.num_scheduled + count) - len(seq.blocks)

    def lacks_blocks(self, seq: Sequence, count: int) -> bool:
        """Whether there are too few for that."""
        return self.new_blocks(seq, count) > self.pool.num_free

    def admit(self, seq: Sequence, adapter_slot: int) -> int:
        """Gives a sequence that has pinned its adapter slot a request slot, which it returns."""
        seq.request_slot = request_slot = heapq.heappop(self._free)
        self._adapter_slots[request_slot] = adapter_slot
        return request_slot

    def grow(self, seq: Sequence, count: int) -> None:
        """Gives the blocks for `count` more tokens; there must be room."""
        seq.blocks += self.pool.allocate(self.new_blocks(seq, count))

    def release(self, seq: Sequence) -> None:
        """Takes back all that a sequence holds; published blocks stay cached."""
        assert seq.request_slot is not None
        self.pool.free(seq.blocks)
        self.adapters.unpin(seq.mix)
        del self._adapter_slots[seq.request_slot]
        heapq.heappush(self._free, seq.request_slot)
        self._freed.append(seq.request_slot)
        seq.blocks, seq.request_slot = [], None

    def take_freed(self) -> tuple[int, ...]:
        """The request slots that sequences left since it was last asked."""
        freed, self._freed = tuple(self._freed), []
        return freed

    def reset(self) -> None:
        """Nobody holds anything. Idempotent."""
        self._free = list(range(self._max_num_seqs))
        self._freed.clear()
        self._adapter_slots.clear()

    def check_integrity(self, running: Items[Sequence], waiting: Items[Sequence]) -> None:
        """Asserts that what the sequences hold is what the pool and the request slots say."""
        self.pool.check_integrity(seq.blocks for seq in [*waiting, *running])
        taken = sorted(seq.request_slot for seq in running if seq.request_slot is not None)
        assert len(taken) == len(running), "a running sequence has no request slot"
        every = sorted([*taken, *self._free])
        assert every == list(range(self._max_num_seqs)), "request slots differ"
        assert sorted(self._adapter_slots) == taken, "adapter slots differ"
        for seq in running:
            assert len(seq.blocks) == self.pool.blocks_for(seq.num_scheduled)


class WithoutSlot:
    """The sequences for which one step has no adapter slot.

    Once as many as can run have overtaken one of them, no other takes a slot before it, so that
    slots fall free.
    """

    def __init__(self, max_num_seqs: int) -> None:
        self._max_num_seqs = max_num_seqs
        self._seqs: list[Sequence] = []
        self._mixes: set[Mix] = set()  # there is no room for them in this step
        self._most = 0  # times that any of them was overtaken

    def lets_pass(self, mix: Mix) -> bool:
        """Whether a sequence of that mix may ask for a slot. The base needs none."""
        return not mix or (self._most < self._max_num_seqs and mix not in self._mixes)

    def covers(self, mixes: Collection[Mix]) -> bool:
        """Whether no sequence of any of these mixes may ask for a slot in this step."""
        if self._most >= self._max_num_seqs:
            return () not in mixes
        return len(self._mixes) >= len(mixes) and self._mixes.issuperset(mixes)

    def add(self, seq: Sequence) -> None:
        """It found none."""
        self._seqs.append(seq)
        self._mixes.add(seq.mix)
        self._most = max(self._most, seq.num_overtaken)

    def overtake(self) -> None:
        """A sequence behind them got one."""
        for seq in self._seqs:
            seq.num_overtaken += 1
            self._most = max(self._most, seq.num_overtaken)
