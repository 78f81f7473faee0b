"""What running sequences hold: KV blocks, a row of the runner, an adapter slot."""

from __future__ import annotations

import heapq
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


class Holdings:
    """Gives and takes back; `pool` and `adapters` are reset by whoever owns them."""

    def __init__(self, pool: BlockPool, adapters: AdapterSlots, max_num_seqs: int) -> None:
        self.pool, self.adapters = pool, adapters
        self._max_num_seqs = max_num_seqs
        self._free_rows = list(range(max_num_seqs))  # a heap: low rows first
        self._left_rows: list[int] = []  # left since `take_left_rows`
        self._slots: dict[int, int] = {}  # row -> adapter slot

    @property
    def has_row(self) -> bool:
        """Whether one more sequence can run."""
        return bool(self._free_rows)

    def slot(self, seq: Sequence) -> int:
        """The adapter slot of a running sequence."""
        assert seq.row is not None
        return self._slots[seq.row]

    def new_blocks(self, seq: Sequence, count: int) -> int:
        """Blocks that a sequence lacks to compute `count` more tokens."""
        return self.pool.blocks_for(seq.num_scheduled + count) - len(seq.blocks)

    def lacks_blocks(self, seq: Sequence, count: int) -> bool:
        """Whether there are too few for that."""
        return self.new_blocks(seq, count) > self.pool.num_free

    def admit(self, seq: Sequence, slot: int) -> int:
        """Gives a row to a sequence that has pinned its slot; the row."""
        seq.row = row = heapq.heappop(self._free_rows)
        self._slots[row] = slot
        return row

    def grow(self, seq: Sequence, count: int) -> None:
        """Gives the blocks for `count` more tokens; there must be room."""
        seq.blocks += self.pool.allocate(self.new_blocks(seq, count))

    def release(self, seq: Sequence) -> None:
        """Takes back all that a sequence holds; published blocks stay cached."""
        assert seq.row is not None
        self.pool.free(seq.blocks)
        self.adapters.unpin(seq.mix)
        del self._slots[seq.row]
        heapq.heappush(self._free_rows, seq.row)
        self._left_rows.append(seq.row)
        seq.blocks, seq.row = [], None

    def take_left_rows(self) -> tuple[int, ...]:
        """The rows that sequences left since it was last asked."""
        left, self._left_rows = tuple(self._left_rows), []
        return left

    def reset(self) -> None:
        """Nobody holds anything. Idempotent."""
        self._free_rows = list(range(self._max_num_seqs))
        self._left_rows.clear()
        self._slots.clear()

    def check_integrity(self, running: Items[Sequence], waiting: Items[Sequence]) -> None:
        """Asserts that what the sequences hold is what the pool and the rows say."""
        self.pool.check_integrity(seq.blocks for seq in [*waiting, *running])
        rows = sorted(seq.row for seq in running if seq.row is not None)
        assert len(rows) == len(running), "a running sequence has no row"
        assert sorted([*rows, *self._free_rows]) == list(range(self._max_num_seqs)), "rows differ"
        assert sorted(self._slots) == rows, "adapter slots differ"
        for seq in running:
            assert len(seq.blocks) == self.pool.blocks_for(seq.num_scheduled)
