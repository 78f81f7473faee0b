"""Which KV block belongs to whom: free list, reference counts and prefix cache. Integers only.

A block is free (on the free list), used (some sequence refers to it), or idle: nobody refers to it
but it still holds a published prefix, which a later request may take over and which is evicted,
least recently used first, when the free list is empty.
"""

from __future__ import annotations

import hashlib
import struct
from collections import Counter, OrderedDict, deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

ROOT_KEY = b""
"""The parent key of a sequence's first block."""


def block_key(parent: bytes, runs: Sequence[tuple[int, bytes]], tokens: Sequence[int]) -> bytes:
    """The SHA-256 that names a full block: all tokens up to its end, and who computed them.

    `parent` is the key of the block before (ROOT_KEY at the start); `runs` are the (offset in the
    block, identity) pairs where the adapter mix changes, the first at offset 0. Lengths enter the
    hash, so that no two inputs read alike.
    """
    digest = hashlib.sha256(struct.pack("<qqq", len(parent), len(runs), len(tokens)))
    digest.update(parent)
    for offset, identity in runs:
        digest.update(struct.pack("<qq", offset, len(identity)))
        digest.update(identity)
    digest.update(struct.pack(f"<{len(tokens)}q", *tokens))
    return digest.digest()


class BlockPool:
    """Hands out the blocks `0 .. num_blocks - 1` and remembers what the published ones hold."""

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self._free = deque(range(num_blocks))
        self._refs = [0] * num_blocks
        self._block_of: dict[bytes, int] = {}  # published key -> block
        self._key_of: dict[int, bytes] = {}  # and back
        self._idle: OrderedDict[int, None] = OrderedDict()  # published, unused; next victim first

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can give, idle ones included."""
        return len(self._free) + len(self._idle)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold so many tokens."""
        return -(-num_tokens // self.block_size)

    def match(self, keys: Iterable[bytes]) -> list[int]:
        """The published blocks of these keys, up to the first key that none has.

        Takes no reference: `acquire` the blocks before anything else is allocated.
        """
        found: list[int] = []
        for key in keys if self.enable_prefix_caching else ():
            block = self._block_of.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def acquire(self, blocks: Iterable[int]) -> None:
        """Takes one more reference to each block of a match."""
        for block in blocks:
            assert self._refs[block] or block in self._idle, f"block {block} holds nothing"
            self._idle.pop(block, None)
            self._refs[block] += 1

    def allocate(self, count: int) -> list[int]:
        """`count` blocks of undefined content, referenced once; the caller checked `num_free`."""
        assert count <= self.num_free, f"{count} blocks asked, {self.num_free} free"
        blocks = [self._free.popleft() if self._free else self._evict() for _ in range(count)]
        for block in blocks:
            self._refs[block] = 1
        return blocks

    def publish(self, block: int, key: bytes) -> None:
        """Lets others find a used block, whose KV is written, under its key.

        When another block has the key already, that one stays and this one is not published.
        """
        assert self._refs[block], f"block {block} is not in use"
        if self.enable_prefix_caching and key not in self._block_of:
            assert block not in self._key_of, f"block {block} has a key already"
            self._block_of[key] = block
            self._key_of[block] = key

    def free(self, blocks: Sequence[int]) -> None:
        """Drops one reference to each block of a sequence, given from its head to its tail."""
        for block in reversed(blocks):  # the tail is evicted first: without its head it is useless
            assert self._refs[block], f"block {block} is not in use"
            self._refs[block] -= 1
            if self._refs[block]:
                continue
            if block in self._key_of:
                self._idle[block] = None
            else:
                self._free.append(block)

    def reset(self) -> None:
        """Nobody refers to any block; what is published stays so. Idempotent.

        A block leaves `_block_of` before it is handed out, and enters when its KV is complete: that
        table alone says what is valid, whatever was raised in between.
        """
        self._key_of = {block: key for key, block in self._block_of.items()}
        lately_used = [block for block in self._key_of if block not in self._idle]
        idle = [block for block in self._idle if block in self._key_of]
        self._idle = OrderedDict.fromkeys(idle + lately_used)
        self._refs = [0] * self.num_blocks
        self._free = deque(block for block in range(self.num_blocks) if block not in self._key_of)

    def forget(self) -> None:
        """Nothing is published any more. Only while nobody refers to any block."""
        assert self.num_free == self.num_blocks, "blocks are in use"
        self._block_of.clear()
        self.reset()

    def check_integrity(self, owners: Iterable[Sequence[int]]) -> None:
        """Asserts that references equal the owners' block lists and that no block is lost."""
        refs = Counter(block for blocks in owners for block in blocks)
        assert [refs[block] for block in range(self.num_blocks)] == self._refs, "references differ"
        assert refs.total() == sum(self._refs), "an owner has a block of no pool"
        used = {block for block, count in enumerate(self._refs) if count}
        every = sorted([*self._free, *self._idle, *used])
        assert every == list(range(self.num_blocks)), "a block is lost, or in two places"
        assert self._idle.keys() <= self._key_of.keys(), "an idle block holds no prefix"
        assert self._key_of == {block: key for key, block in self._block_of.items()}
        assert not self._key_of.keys() & set(self._free), "a free block is still published"

    def _evict(self) -> int:
        block, _ = self._idle.popitem(last=False)
        del self._block_of[self._key_of.pop(block)]
        return block
