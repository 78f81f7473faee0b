"""The adapter store: names, versions, mixes, and what stays on the device when it is full."""

from __future__ import annotations

import dataclasses
import math
from itertools import permutations
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from multilora.adapters.store import AdapterInfo
from multilora.errors import (
    AdapterError,
    AdapterInvalid,
    AdapterNotFound,
    AdapterTooLarge,
    CapacityError,
    RequestError,
)
from tests.harness.small_stores import (
    check_content,
    device_state,
    load,
    make_adapter,
    make_store,
)


def test_infos_list_what_is_loaded() -> None:
    store = make_store()
    assert store.load("team/b:v1.2", make_adapter("d1", rank=9, sites=("qkv", "o"))) == "d1"
    load(store, "a")
    size = 2 * 2 * (2 * 8 * 4 + 8 * 6 + 8 * 4 + 8 * 4) * 4  # pages, layers, values, bytes
    assert list(store.infos()) == ["a", "team/b:v1.2"]
    assert store.infos()["team/b:v1.2"] == AdapterInfo("team/b:v1.2", "d1", 9, size, False)
    assert store.num_bytes == 0  # on the device only when a request needs it


@pytest.mark.parametrize("name", ["", "-a", "a..b", "a b", "a\n", "x" * 129, "é", "../a", None, 3])
def test_bad_names_are_refused(name: Any) -> None:
    store = make_store()
    with pytest.raises(AdapterError, match="not allowed"):
        store.load(name, make_adapter("d"))
    assert store.infos() == {}
    store.check_integrity()


def test_unload_forgets_the_name_and_unknown_names_list_the_known() -> None:
    store = make_store()
    with pytest.raises(AdapterNotFound, match="none is"):
        store.unload("a")
    load(store, "a", "b")
    mix = store.resolve("a")
    store.unload("a")
    assert not store.ready(mix)
    for use in (store.unload, store.resolve):
        with pytest.raises(AdapterNotFound, match="'a' is loaded; loaded: b"):
            use("a")
    store.check_integrity()


def test_two_names_of_one_adapter_share_it() -> None:
    store = make_store()
    for name in ("x", "y"):
        store.load(name, make_adapter("d"))
    assert store.resolve({"x": 0.5, "y": 1}) == (("d", 1.5),)
    assert store.pin(store.resolve("x")) == store.pin(store.resolve("y"))
    store.unload("x")
    assert store.ready((("d", 1.0),))
    store.check_integrity()


def test_too_large_adapters_are_refused_with_the_cure() -> None:
    with pytest.raises(AdapterTooLarge, match="restart with max_lora_rank=40"):
        make_store().load("a", make_adapter("d", rank=33))
    with pytest.raises(AdapterTooLarge, match="restart with lora_pages=3"):
        make_store(lora_pages=2).load("a", make_adapter("d", rank=17))


def test_overflow_names_the_adapter_and_changes_nothing() -> None:
    store = make_store()
    load(store, "a")
    bad = make_adapter("bad")
    ((key, module),) = bad.modules.items()
    bad = dataclasses.replace(bad, modules={key: dataclasses.replace(module, scale=1e39)})
    with pytest.raises(AdapterInvalid, match=r"adapter 'a': .*site qkv"):
        store.load("a", bad)
    assert store.resolve("a") == (("a", 1.0),)
    store.check_integrity()


def test_another_base_is_refused_by_its_rows() -> None:
    weight = torch.randn(12, 4)
    own = {"embed": weight.bfloat16()}
    same = dataclasses.replace(make_adapter("d1"), weights={"embed": own["embed"]})
    finer = dataclasses.replace(make_adapter("d2"), weights={"embed": weight})
    changed = dataclasses.replace(make_adapter("d3"), weights={"embed": weight * 1.1})
    store = make_store(max_lora_token_rows=11)
    store.load("same", same, base=own)
    store.load("finer", finer, base=own)
    store.load("coarser", same, base={"embed": weight})
    with pytest.raises(AdapterInvalid, match="changes 12 rows"):
        store.load("changed", changed, base=own)
    assert "changed" not in store.infos()


def test_resolve_sorts_sums_and_drops() -> None:
    store = make_store()
    load(store, "b", "a", "c")
    store.load("again", make_adapter("a"))
    assert store.resolve(None) == store.resolve({}) == ()
    assert store.resolve("b") == (("b", 1.0),)
    mix = store.resolve({"c": 0.0, "b": -2, "again": 0.25, "a": 0.5})
    assert mix == (("a", 0.75), ("b", -2.0))
    assert all(type(weight) is float for _, weight in mix)
    assert store.resolve({"a": 1.0, "again": -1.0}) == ()


@pytest.mark.parametrize(
    "weight",
    [math.nan, math.inf, -math.inf, 1e39, pytest.param(10**400, id="10**400"), True, "1", None],
)
def test_weights_must_be_finite_numbers(weight: Any) -> None:
    store = make_store()
    load(store, "a")
    with pytest.raises(RequestError, match="weight of adapter 'a' must be"):
        store.resolve({"a": weight})


@pytest.mark.parametrize("adapter", [3, ["a"], {1: 1.0}, b"a"])
def test_other_types_are_refused(adapter: Any) -> None:
    with pytest.raises(RequestError, match="must be"):
        make_store().resolve(adapter)


def test_a_sum_of_weights_that_overflows_is_refused() -> None:
    store = make_store()
    for name in ("x", "y"):
        store.load(name, make_adapter("d"))
    with pytest.raises(RequestError, match="finite"):
        store.resolve({"x": 3e38, "y": 3e38})


def test_mixes_that_can_never_fit_are_refused_with_the_cure() -> None:
    store = make_store(max_lora_rank=16)
    load(store, "a", rank=16)
    load(store, "b")
    with pytest.raises(AdapterTooLarge, match=r"rank 24 .* qkv.* max_lora_rank=24"):
        store.resolve({"a": 1, "b": 1})
    load(store, "elsewhere", sites=("o",))
    assert len(store.resolve({"a": 1, "elsewhere": 1})) == 2
    small = make_store(lora_pages=1)
    load(small, "a", "b")
    with pytest.raises(CapacityError, match="lora_pages=2"):
        small.resolve({"a": 1, "b": 1})


def test_a_replaced_adapter_serves_its_requests_to_their_end() -> None:
    store = make_store()
    store.load("x", make_adapter("old"))
    old = store.resolve("x")
    store.hold(old)
    store.load("x", make_adapter("new"))
    assert store.resolve("x") == (("new", 1.0),)
    assert store.infos()["x"].digest == "new"
    slot = store.pin(old)
    assert slot is not None
    check_content(store, slot, [(make_adapter("old"), 1.0)])
    store.check_integrity()
    store.unpin(old)
    assert store.ready(old)  # it is still held
    store.release(old)
    assert not store.ready(old)
    assert store.pin(old) is None
    assert store.pool("qkv").used == frozenset()
    store.check_integrity()


def test_an_unloaded_adapter_stays_while_it_is_pinned() -> None:
    store = make_store()
    load(store, "a", "b")
    mix = store.resolve({"a": 1, "b": 1})
    store.pin(mix)
    store.unload("a")
    store.check_integrity()
    assert store.pin(mix) is not None
    store.unpin(mix)
    assert store.ready(mix)
    store.unpin(mix)
    assert not store.ready(mix)
    assert len(store.pool("qkv").used) == 1  # b's
    store.check_integrity()


def test_reloading_the_same_content_changes_nothing() -> None:
    store = make_store()
    load(store, "a")
    slot = store.pin(store.resolve("a"))
    before = device_state(store)
    load(store, "a")
    assert device_state(store) == before
    assert store.pin(store.resolve("a")) == slot


def test_check_integrity_sees_damage() -> None:
    store = make_store()
    load(store, "a")
    slot = store.pin(store.resolve("a"))
    assert slot is not None
    store.check_integrity()
    store.table.clear(slot)
    with pytest.raises(AssertionError):
        store.check_integrity()


VERSIONS = {
    "d0": make_adapter("d0", rank=4),
    "d1": make_adapter("d1", rank=9, sites=("qkv", "o")),
    "d2": make_adapter("d2", rank=17, sites=("o",)),
    "d3": make_adapter("d3", rank=8, sites=("embed", "qkv", "o")),
}
NAMES = st.sampled_from("xyz")
OPS = st.one_of(
    st.tuples(st.just("load"), NAMES, st.sampled_from(sorted(VERSIONS))),
    st.tuples(st.just("unload"), NAMES),
    st.tuples(st.just("hold"), st.dictionaries(NAMES, st.sampled_from([1.0, -0.5]), max_size=3)),
    st.tuples(st.sampled_from(["pin", "unpin", "release"]), st.integers(0, 9)),
)


@settings(max_examples=60)
@given(
    ops=st.lists(OPS, max_size=30),
    max_loras=st.integers(1, 3),
    lora_pages=st.integers(3, 6),
)
def test_any_order_of_operations_keeps_the_store_whole(
    ops: list[tuple[Any, ...]], max_loras: int, lora_pages: int
) -> None:
    store = make_store(max_loras=max_loras, lora_pages=lora_pages, max_lora_rank=48)
    held: list[Any] = []  # mixes of requests in flight
    pinned: list[tuple[Any, int]] = []
    for kind, *rest in ops:
        if kind == "load":
            store.load(rest[0], VERSIONS[rest[1]])
        elif kind == "unload" and rest[0] in store.infos():
            store.unload(rest[0])
        elif kind == "hold" and rest[0].keys() <= store.infos().keys():
            try:
                mix = store.resolve(rest[0])
            except CapacityError:
                continue
            store.hold(mix)
            held.append(mix)
        elif kind == "release" and held:
            store.release(held.pop(rest[0] % len(held)))
        elif kind == "pin" and held:
            mix = held[rest[0] % len(held)]
            before = device_state(store)
            slot = store.pin(mix)
            if slot is None:
                assert pinned  # a mix that could be resolved fits an idle device
                assert device_state(store) == before
            else:
                pinned.append((mix, slot))
        elif kind == "unpin" and pinned:
            store.unpin(pinned.pop(rest[0] % len(pinned))[0])
        store.check_integrity()
        assert all(store.ready(mix) for mix in held)
        for mix, slot in pinned:
            if mix:
                check_content(store, slot, [(VERSIONS[d], w) for d, w in mix])


def test_the_order_of_names_does_not_change_a_mix() -> None:
    store = make_store()
    for name in "xyz":
        store.load(name, make_adapter("a"))
    weights = {"x": 0.1, "y": 0.2, "z": 0.3}  # 0.6 or 0.6000000000000001, added one by one
    found = {
        store.resolve({name: weights[name] for name in names}) for names in permutations("xyz")
    }
    assert found == {(("a", 0.6),)}
