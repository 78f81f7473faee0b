"""The identity of a mix: equal for equal mixes alone, and the same in every process."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from multilora.adapters.mix import Mix, check_version, mix_identity, names_of
from multilora.errors import AdapterNotFound
from tests.harness.small_stores import load, make_store

WEIGHTS = st.floats(allow_nan=False, allow_infinity=False, width=32).filter(bool)
MIXES = st.dictionaries(st.text("ab,\"'[ ", max_size=3), WEIGHTS, max_size=3).map(
    lambda mix: tuple(sorted(mix.items()))
)


@given(MIXES, MIXES)
def test_it_is_equal_for_equal_mixes_alone(one: Mix, other: Mix) -> None:
    assert (mix_identity(one) == mix_identity(other)) == (one == other)


def test_mixes_that_look_alike_differ() -> None:
    mixes: list[Mix] = [
        (),
        (("a", 1.0),),
        (("a", 0.1 + 0.2),),
        (("a", 0.3),),
        (("ab", 1.0),),
        (("a", 1.0), ("b", 1.0)),
        (("a", 1.0), ("b", -1.0)),
    ]
    assert len({mix_identity(mix) for mix in mixes}) == len(mixes)


def test_it_is_a_hash_of_digests_and_exact_weights() -> None:
    text = b'[["a", "0x1.0000000000000p-1"], ["b", "0x1.8000000000000p+0"]]'
    assert mix_identity((("a", 0.5), ("b", 1.5))) == hashlib.sha256(text).digest()
    assert mix_identity(()) == hashlib.sha256(b"[]").digest()


def test_a_store_gives_it_with_the_mix() -> None:
    store = make_store()
    load(store, "a", "b")
    mix, identity, start = store.acquire({"b": 0.5, "a": 1.0})
    assert (mix, start) == ((("a", 1.0), ("b", 0.5)), 0)
    assert identity == mix_identity(mix)
    store.release(mix)
    assert store.acquire(None) == ((), mix_identity(()), None)


def test_a_name_may_ask_for_a_version() -> None:
    assert names_of({"a": 1.0, "a@3fa9c1": 2.0, "b@3fa9c1": 1.0}) == ["a", "b"]
    assert (names_of(None), names_of("a@")) == ([], ["a"])
    digest = "3fa9c1" + "0" * 58
    for name in ("a", "a@3fa9c1", f"a@{digest}"):
        check_version(name, digest)
    for name in ("a@3fa9c2", f"a@{digest[:-1]}1"):
        with pytest.raises(AdapterNotFound, match="adapter 'a' is at 3fa9c10"):
            check_version(name, digest)
    for name in ("a@", "a@3fa9c", "a@3FA9C1", "a@3fa9c1@3fa9c1"):
        with pytest.raises(AdapterNotFound, match="is no version of 'a'; give 6 to 64 digits"):
            check_version(name, digest)
