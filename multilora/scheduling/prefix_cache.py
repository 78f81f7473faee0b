"""Which full blocks sequences share: a block is named by all tokens up to its end."""

from __future__ import annotations

from collections.abc import Collection

from .block_pool import ROOT_KEY, BlockPool, block_key
from .sequence import Sequence


class PrefixCache:
    """Finds the cached start of a sequence, and publishes the blocks that it fills."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._keys: dict[int, list[bytes]] = {}  # seq_id -> keys of its first blocks, as asked for

    def match(self, seq: Sequence) -> list[int]:
        """The published blocks that begin a sequence; at least one of its tokens is left over."""
        if seq.params.prompt_logprobs is not None:  # they need the logits of the whole prompt
            return []
        limit = seq.num_tokens - 1  # one token must be computed, to have logits
        return self._pool.match(self._key(seq, i) for i in range(limit // self._pool.block_size))

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
            tokens = seq.tokens(i * size, (i + 1) * size)
            keys.append(block_key(keys[-1] if keys else ROOT_KEY, ((0, seq.identity),), tokens))
        return keys[index]

    def forget(self, seq: Sequence) -> None:
        """Drops the keys of a sequence that has ended; its published blocks stay."""
        self._keys.pop(seq.seq_id, None)

    def keep(self, seq_ids: Collection[int]) -> None:
        """Drops the keys of all other sequences."""
        self._keys = {seq_id: keys for seq_id, keys in self._keys.items() if seq_id in seq_ids}

    def check_integrity(self, seq_ids: Collection[int]) -> None:
        """Asserts that keys are of these sequences alone."""
        assert self._keys.keys() <= set(seq_ids), "keys of a sequence that is gone"
