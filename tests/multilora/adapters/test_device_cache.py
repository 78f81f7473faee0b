"""Slots and pages of the device: who gets them, who stays, who leaves first."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from multilora.adapters.store import AdapterStore
from multilora.config.engine import EngineConfig
from tests.harness.small_stores import (
    SITES,
    check_content,
    device_state,
    load,
    make_adapter,
    make_store,
)


def test_the_base_takes_no_slot() -> None:
    store = make_store()
    assert [store.pin(()) for _ in range(9)] == [-1] * 9
    store.unpin(())
    assert store.active_sites([-1, -1]) == frozenset()
    store.check_integrity()


def test_a_pinned_mix_has_its_adapters_pages_one_after_the_other() -> None:
    store = make_store()
    one = make_adapter("a", rank=9, sites=("embed", "qkv"))
    two = make_adapter("b", rank=3, sites=("qkv", "o"))
    store.load("a", one)
    store.load("b", two)
    slot = store.pin(store.resolve({"b": -0.5, "a": 2}))
    assert slot is not None
    check_content(store, slot, [(one, 2.0), (two, -0.5)])
    alone = store.pin(store.resolve("a"))
    assert alone is not None
    check_content(store, alone, [(one, 1.0)])
    assert store.table.row(slot, "qkv")[0][:2] == store.table.row(alone, "qkv")[0]  # shared
    assert len(store.pool("qkv").used) == 3
    store.check_integrity()


def test_active_sites_are_those_that_the_slots_adapt() -> None:
    store = make_store()
    load(store, "a", sites=("qkv",))
    load(store, "b", sites=("embed", "o"))
    a, b = store.pin(store.resolve("a")), store.pin(store.resolve("b"))
    assert a is not None
    assert b is not None
    assert store.active_sites([a, -1]) == {"qkv"}
    assert store.active_sites([b, b]) == {"embed", "o"}
    assert store.active_sites([a, b]) == set(SITES)


def test_the_widest_slot_has_the_most_pages_at_one_site() -> None:
    store = make_store(max_loras=3)
    store.load("a", make_adapter("a", rank=8, sites=("qkv", "o")))
    store.load("b", make_adapter("b", rank=16, sites=("o",)))
    a, b, both = (store.pin(store.resolve(mix)) for mix in ("a", "b", {"a": 1.0, "b": 1.0}))
    assert a is not None
    assert b is not None
    assert both is not None
    assert store.most_pages([]) == store.most_pages([-1]) == 0
    assert store.most_pages([a, -1]) == 1
    assert store.most_pages([a, b]) == 2
    assert store.most_pages([both]) == 3  # all at "o"


@pytest.mark.parametrize(
    ("settings", "is_gpu", "pages"),
    [({}, False, 128), ({}, True, 64), ({"max_loras": 3}, True, 12), ({"lora_pages": 5}, True, 5)],
)
def test_as_many_pages_as_the_settings_and_the_device_say(
    settings: dict[str, Any], is_gpu: bool, pages: int
) -> None:
    config = EngineConfig(model="m", **settings)
    assert config.pages_per_site(is_gpu=is_gpu) == pages
    store = AdapterStore(SITES, config, dtype=torch.float32, is_gpu=is_gpu)
    assert {store.pool(site).capacity for site in SITES} == {pages}


def test_a_site_without_an_adapter_takes_no_memory() -> None:
    store = make_store()
    load(store, "a", sites=("qkv",))
    store.pin(store.resolve("a"))
    assert [store.pool(name).is_allocated for name in ("embed", "qkv", "o")] == [False, True, False]
    assert store.num_bytes == store.infos()["a"].num_bytes


def test_no_free_slot_gives_none_and_changes_nothing() -> None:
    store = make_store(max_loras=2)
    load(store, "a", "b", "c")
    slots = [store.pin(store.resolve(name)) for name in ("a", "b", "a")]
    assert slots[0] == slots[2]
    before = device_state(store)
    assert store.pin(store.resolve("c")) is None
    assert device_state(store) == before
    store.unpin(store.resolve("a"))
    assert store.pin(store.resolve("c")) is None  # a is pinned once more
    store.unpin(store.resolve("a"))
    assert store.pin(store.resolve("c")) == slots[0]
    store.check_integrity()


def test_no_free_page_gives_none_and_changes_nothing() -> None:
    store = make_store(max_loras=4, lora_pages=3)
    load(store, "a", "b", sites=("qkv", "o"))
    load(store, "big", rank=16, sites=("o",))
    for name in ("a", "b"):
        store.pin(store.resolve(name))
    store.unpin(store.resolve("a"))
    store.pin(store.resolve("a"))
    before = device_state(store)
    assert store.pin(store.resolve("big")) is None
    assert device_state(store) == before
    store.unpin(store.resolve("b"))
    assert store.pin(store.resolve("big")) is not None
    assert store.pool("o").num_free == 0
    assert store.pool("qkv").num_free == 2
    store.check_integrity()


def test_the_least_recently_used_mix_leaves_first() -> None:
    store = make_store(max_loras=3)
    load(store, "a", "b", "c", "d")
    slots = {}
    for name in ("a", "b", "c"):
        slots[name] = store.pin(store.resolve(name))
        store.unpin(store.resolve(name))
    assert store.pin(store.resolve("a")) == slots["a"]  # so b is the oldest
    store.unpin(store.resolve("a"))
    assert store.pin(store.resolve("d")) == slots["b"]
    assert store.pin(store.resolve("a")) == slots["a"]
    assert store.pin(store.resolve("c")) == slots["c"]


def test_the_least_recently_used_adapter_gives_its_pages() -> None:
    store = make_store(max_loras=8, lora_pages=2)
    adapters = {name: make_adapter(name) for name in ("a", "b", "c")}
    for name, adapter in adapters.items():
        store.load(name, adapter)
    pages = {}
    for name in ("a", "b", "a"):
        slot = store.pin(store.resolve(name))
        assert slot is not None
        pages[name] = store.table.row(slot, "qkv")[0]
        store.unpin(store.resolve(name))
    slot = store.pin(store.resolve("c"))
    assert slot is not None
    assert store.table.row(slot, "qkv")[0] == pages["b"]
    store.check_integrity()


def test_copies_are_counted_by_the_adapter() -> None:
    store = make_store(max_loras=8, lora_pages=2)
    load(store, "a", "b", "c")
    found = []
    for spec in ("a", "a", {"a": 0.5, "b": 1.0}, "b", "c", "a"):
        store.pin(store.resolve(spec))
        store.unpin(store.resolve(spec))
        found.append(store.num_copies)
    assert found == [1, 1, 2, 2, 3, 4]  # c took the pages of a


def test_an_adapter_of_a_pinned_mix_keeps_its_pages() -> None:
    store = make_store(max_loras=8, lora_pages=2)
    load(store, "a", "b", "c")
    store.pin(store.resolve({"a": 1, "b": 1}))
    assert store.pin(store.resolve("a")) is not None
    assert store.pin(store.resolve("c")) is None
    store.check_integrity()


def test_a_mix_does_not_evict_its_own_adapter() -> None:
    store = make_store(max_loras=8, lora_pages=2)
    load(store, "a", "b", "c")
    for name in ("a", "c"):
        store.pin(store.resolve(name))
        store.unpin(store.resolve(name))
    slot = store.pin(store.resolve({"a": 1, "b": 1}))  # a is the oldest, but c must leave
    assert slot is not None
    check_content(store, slot, [(make_adapter("a"), 1.0), (make_adapter("b"), 1.0)])
    store.check_integrity()


def test_evicted_and_reloaded_pages_are_the_same_bytes() -> None:
    store = make_store(max_loras=1, lora_pages=2)
    a = make_adapter("a", rank=12, sites=("embed", "qkv"))
    b = make_adapter("b", rank=16, sites=("embed", "qkv"))
    store.load("a", a)
    store.load("b", b)
    for adapter in (a, b, a, b):
        mix = store.resolve(adapter.digest)
        slot = store.pin(mix)
        assert slot is not None
        check_content(store, slot, [(adapter, 1.0)])
        store.unpin(mix)
        store.check_integrity()
