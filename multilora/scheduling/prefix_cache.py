"""Which full blocks sequences share: a block is named by all tokens up to its end."""

from __future__ import annotations

from collections.abc import Collection, Container, Iterable

from ..adapters.mix import BASE_IDENTITY
from .block_pool import ROOT_KEY, BlockPool, block_key
from .sequence import Sequence


class PrefixCache:
    """Finds the cached start of a sequence, and publishes the blocks that it fills."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._keys: dict[int, list[bytes]] = {}  # seq_id -> keys of its first blocks, as asked for
        self._awaited: dict[int, bytes] = {}  # seq_id -> what it lacked when it was asked last

    def match(self, seq: Sequence) -> list[int]:
        """The published blocks that begin a sequence; at least one of its tokens is left over."""
        if seq.params.prompt_logprobs is not None:  # they need the logits of the whole prompt
            return []
        limit = seq.num_tokens - 1  # one token must be computed, to have logits
        return self._pool.match(self._key(seq, i) for i in range(limit // self._pool.block_size))

    def upcoming(self, seqs: Iterable[Sequence]) -> set[bytes]:
        """Keys of the blocks that these running sequences are about to publish, of each the next.

        Only blocks whose tokens are all known: no other sequence waits for what is yet sampled.
        """
        if not self._pool.enable_prefix_caching:
            return set()
        size = self._pool.block_size
        found = set()
        for seq in seqs:
            index = seq.num_computed // size
            if (index + 1) * size <= seq.num_tokens and seq.finish_reason is None:
                found.add(self._key(seq, index))
        return found

    def awaits(self, seq: Sequence, upcoming: Container[bytes]) -> bool:
        """Whether the block that a waiting sequence lacks first is about to be published.

        Then it has no need to compute it itself.
        """
        if not upcoming or seq.params.prompt_logprobs is not None:
            return False
        if self._awaited.get(seq.seq_id) in upcoming:  # most wait on: no need to look again
            return True
        index = len(self.match(seq))
        if (index + 1) * self._pool.block_size >= seq.num_tokens:
            return False
        key = self._awaited[seq.seq_id] = self._key(seq, index)
        return key in upcoming

    def publish(self, seq: Sequence, start: int) -> None:
        """Publishes the blocks that became full when the tokens from `start` on were computed."""
        if not self._pool.enable_prefix_caching:
            return
        size = self._pool.block_size
        for i in range(start // size, seq.num_computed // size):
            self._pool.publish(seq.blocks[i], self._key(seq, i))

    def _key(self, seq: Sequence, index: int) -> bytes:
        """The key of a full block. Each is made once, however often a sequence asks for room."""
        size, keys = self._pool.block_size, self._keys.setdefault(seq.seq_id, [])
        for i in range(len(keys), index + 1):
            start, end = i * size, (i + 1) * size
            parent = keys[-1] if keys else ROOT_KEY
            keys.append(block_key(parent, _runs(seq, start, end), seq.tokens(start, end)))
        return keys[index]

    def forget(self, seq: Sequence) -> None:
        """Drops the keys of a sequence that has ended; its published blocks stay."""
        self._keys.pop(seq.seq_id, None)
        self._awaited.pop(seq.seq_id, None)

    def keep(self, seq_ids: Collection[int]) -> None:
        """Drops the keys of all other sequences."""
        self._keys = {seq_id: keys for seq_id, keys in self._keys.items() if seq_id in seq_ids}
        self._awaited.clear()

    def check_integrity(self, seq_ids: Collection[int]) -> None:
        """Asserts that keys are of these sequences alone."""
        known = self._keys.keys() | self._awaited.keys()
        assert known <= set(seq_ids), "keys of a sequence that is gone"


def _runs(seq: Sequence, start: int, end: int) -> tuple[tuple[int, bytes], ...]:
    """Who computes the tokens `start:end`: the base, and from `adapter_start` on the mix."""
    offset = seq.adapter_start - start
    if offset <= 0:
        return ((0, seq.identity),)
    base = (0, BASE_IDENTITY)
    return (base,) if seq.adapter_start >= end else (base, (offset, seq.identity))
