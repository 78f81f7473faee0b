"""The block pool: what is shared, what is evicted, what is never lost."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from multilora.scheduling.block_pool import ROOT_KEY, BlockPool, block_key

SIZE = 4
TOKENS = list(range(100, 120))


def keys_of(tokens: list[int], identity: bytes = b"a") -> list[bytes]:
    """The keys of a sequence's full blocks."""
    keys = [ROOT_KEY]
    for i in range(len(tokens) // SIZE):
        keys.append(block_key(keys[-1], [(0, identity)], tokens[i * SIZE : (i + 1) * SIZE]))
    return keys[1:]


def publish(pool: BlockPool, blocks: list[int], tokens: list[int], identity: bytes) -> None:
    """Publishes the full blocks of a sequence, as the scheduler does."""
    for block, key in zip(blocks, keys_of(tokens, identity), strict=False):
        pool.publish(block, key)


def pool_with_cached(tokens: list[int], num_blocks: int = 8) -> tuple[BlockPool, list[int]]:
    """A pool whose prefix cache holds `tokens` of the mix b"a", used by nobody."""
    pool = BlockPool(num_blocks, SIZE, True)
    blocks = pool.allocate(pool.blocks_for(len(tokens)))
    publish(pool, blocks, tokens, b"a")
    pool.free(blocks)
    pool.check_integrity([])
    return pool, blocks


@pytest.mark.parametrize(
    "other",
    [
        (b"q", [(0, b"a")], [1, 2]),
        (b"p", [(0, b"b")], [1, 2]),
        (b"p", [(1, b"a")], [1, 2]),
        (b"p", [(0, b"a"), (1, b"b")], [1, 2]),
        (b"p", [(0, b"a")], [2, 1]),
        (b"p", [(0, b"a")], [1, 2, 0]),
        (b"", [(0, b"pa")], [1, 2]),
    ],
)
def test_a_key_tells_apart_parent_runs_and_tokens(
    other: tuple[bytes, list[tuple[int, bytes]], list[int]],
) -> None:
    assert block_key(*other) != block_key(b"p", [(0, b"a")], [1, 2])
    assert block_key(*other) == block_key(*other)


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        (TOKENS[:12], 3),
        (TOKENS[:11], 2),
        (TOKENS[:7], 1),
        (TOKENS[:3], 0),
        ([*TOKENS[:4], 0, *TOKENS[5:12]], 1),
        (TOKENS[4:12], 0),  # the same tokens elsewhere are another prefix
    ],
)
def test_match_finds_the_longest_chain(asked: list[int], found: int) -> None:
    pool, blocks = pool_with_cached(TOKENS[:12])
    assert pool.match(keys_of(asked)) == blocks[:found]


def test_another_identity_or_no_caching_matches_nothing() -> None:
    pool, _ = pool_with_cached(TOKENS)
    assert pool.match(keys_of(TOKENS, b"b")) == []
    plain = BlockPool(8, SIZE, False)
    blocks = plain.allocate(5)
    publish(plain, blocks, TOKENS, b"a")
    assert plain.match(keys_of(TOKENS)) == []
    plain.free(blocks)
    plain.check_integrity([])
    assert plain.num_free == 8


def test_cached_blocks_are_free_until_acquired() -> None:
    pool, blocks = pool_with_cached(TOKENS)
    assert pool.num_free == 8
    pool.acquire(blocks[:2])
    pool.acquire(blocks[:2])
    assert pool.num_free == 6
    pool.check_integrity([blocks[:2], blocks[:2]])
    pool.free(blocks[:2])
    assert pool.num_free == 6
    pool.free(blocks[:2])
    assert pool.num_free == 8


def test_eviction_takes_free_blocks_then_the_least_recent_tail() -> None:
    pool, first = pool_with_cached(TOKENS[:12])  # 3 of 8 cached
    second = pool.allocate(2)
    publish(pool, second, [7] * 8, b"a")
    pool.free(second)
    pool.allocate(3)  # what was free
    assert pool.match(keys_of(TOKENS[:12])) == first
    assert pool.allocate(2) == [first[2], first[1]]
    assert pool.match(keys_of(TOKENS[:12])) == first[:1]
    assert pool.match(keys_of([7] * 8)) == second
    assert pool.allocate(3) == [first[0], second[1], second[0]]
    assert pool.num_free == 0


def test_use_makes_a_prefix_recent() -> None:
    pool, first = pool_with_cached(TOKENS[:8], num_blocks=4)
    second = pool.allocate(2)
    publish(pool, second, [7] * 8, b"a")
    pool.free(second)
    pool.acquire(first)
    pool.free(first)
    assert pool.allocate(2) == [second[1], second[0]]
    assert pool.match(keys_of(TOKENS[:8])) == first


def test_the_first_block_published_under_a_key_stays() -> None:
    pool = BlockPool(4, SIZE, True)
    one, two = pool.allocate(1), pool.allocate(1)
    publish(pool, one, TOKENS[:4], b"a")
    publish(pool, two, TOKENS[:4], b"a")
    pool.free(two)
    assert pool.match(keys_of(TOKENS[:4])) == one
    pool.check_integrity([one])


def test_an_evicted_block_forgets_its_key_and_can_be_published_again() -> None:
    pool, _ = pool_with_cached(TOKENS[:4], num_blocks=1)
    block = pool.allocate(1)
    assert pool.match(keys_of(TOKENS[:4])) == []
    publish(pool, block, [7] * 4, b"a")
    assert pool.match(keys_of([7] * 4)) == block
    pool.check_integrity([block])


def test_misuse_is_caught() -> None:
    pool = BlockPool(2, SIZE, True)
    blocks = pool.allocate(2)
    with pytest.raises(AssertionError, match="0 free"):
        pool.allocate(1)
    with pytest.raises(AssertionError, match="references differ"):
        pool.check_integrity([blocks, blocks[:1]])
    pool.free(blocks)
    with pytest.raises(AssertionError, match="not in use"):
        pool.free(blocks)
    with pytest.raises(AssertionError, match="holds nothing"):
        pool.acquire(blocks)


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 5)), max_size=40))
def test_no_block_is_lost_in_any_order_of_use(steps: list[tuple[int, int]]) -> None:
    pool = BlockPool(6, SIZE, True)
    owned: list[list[int]] = []
    for action, value in steps:
        if action == 0 and owned:
            pool.free(owned.pop(value % len(owned)))
        else:
            tokens = [value % 3] * (SIZE * (1 + value % 4))
            found = pool.match(keys_of(tokens)) if action == 1 else []
            pool.acquire(found)
            missing = len(tokens) // SIZE - len(found)
            if missing > pool.num_free:
                pool.free(found)
            else:
                owned.append(found + pool.allocate(missing))
                new = slice(len(found), None)
                for block, key in zip(owned[-1][new], keys_of(tokens)[new], strict=True):
                    pool.publish(block, key)
        pool.check_integrity(owned)
    for blocks in owned:
        pool.free(blocks)
    pool.check_integrity([])
    assert pool.num_free == 6


def test_after_a_reset_what_was_idle_before_is_evicted_first() -> None:
    pool, idle = pool_with_cached([1] * SIZE)
    used = pool.allocate(1)
    publish(pool, used, [2] * SIZE, b"a")
    pool.reset()
    pool.check_integrity([])
    pool.allocate(pool.num_free - 1)
    assert pool.match(keys_of([1] * SIZE)) == []
    assert pool.match(keys_of([2] * SIZE)) == used != idle


def test_all_that_is_published_can_be_forgotten() -> None:
    pool = BlockPool(4, 4, enable_prefix_caching=True)
    keys = keys_of(TOKENS[:8])
    blocks = pool.allocate(2)
    for block, key in zip(blocks, keys, strict=True):
        pool.publish(block, key)
    with pytest.raises(AssertionError, match="in use"):
        pool.forget()
    pool.free(blocks)
    assert pool.match(keys) == blocks
    pool.forget()
    assert pool.match(keys) == []
    assert sorted(pool.allocate(4)) == [0, 1, 2, 3]
