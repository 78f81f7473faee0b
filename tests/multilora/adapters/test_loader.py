"""What is read, when, in which order, and what a failed read leaves."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from multilora.adapters.loader import (
    AdapterLoader,
    AdapterSource,
    LoadedAdapter,
    RegistryChanges,
)
from multilora.errors import AdapterInvalid, AdapterNotFound
from tests.harness.small_stores import make_adapter, make_store

if TYPE_CHECKING:
    from collections.abc import Iterable

    from multilora.adapters.store import HostAdapter

A_DIGEST = "a"


class House:
    """A loader of adapters whose digest is their folder's name; "bad" cannot be read."""

    def __init__(self, max_bytes: int | None = None, resolver: object = None) -> None:
        self.store, self.now, self.read_names = make_store(), 0.0, list[str]()
        self.gate = threading.Event()
        self.gate.set()
        self.loader = AdapterLoader(
            self.store,
            self.read,
            max_bytes,
            resolver,  # type: ignore[arg-type]
            lambda: self.now,
        )

    def read(self, name: str, source: AdapterSource) -> LoadedAdapter:
        path = Path(source.path)
        assert self.gate.wait(10)
        self.read_names.append(name)
        if path.name == "bad":
            raise AdapterInvalid("it is bad")
        if path.name == "gone":
            raise OSError("the disk is gone")
        adapter = make_adapter(path.name)
        return LoadedAdapter(adapter.digest, self.store.pack(name, adapter))

    def register(self, *names: str, digest: str | None = None) -> None:
        for name in names:
            self.loader.register(name, AdapterSource(Path(name), digest))

    def load(self, *names: str, wanted: Iterable[str] = ()) -> None:
        self.loader.start(names)
        while self.loader.is_busy:
            self.loader.wait(10)
            self.loader.take_in({*wanted})


def test_nothing_is_read_until_it_is_asked_for_and_then_once() -> None:
    house = House()
    house.register("a", "b")
    assert house.loader.missing(["a"]) == ["a"]
    assert (house.read_names, house.loader.state("a")) == ([], "registered")
    house.gate.clear()
    house.loader.start(["a"])
    house.loader.start(["a", "b"])
    assert house.loader.state("a") == "loading"
    assert not house.loader.has_news
    house.gate.set()
    house.load()
    assert house.read_names == ["a", "b"]
    assert house.loader.missing(["a", "b"]) == []
    assert (house.loader.state("a"), house.loader.num_loads) == ("loaded", 2)


def test_a_failure_is_told_for_a_while_that_doubles_and_then_tried_again() -> None:
    house = House()
    house.register("bad")
    for pause in (1, 2, 4, 8, 16, 32, 60, 60):
        house.load("bad")
        assert house.loader.state("bad") == "failed"
        house.now += pause - 0.5
        with pytest.raises(AdapterInvalid, match="it is bad; it can be tried again in"):
            house.loader.missing(["bad"])
        house.now += 1
        assert house.loader.missing(["bad"]) == ["bad"]
    assert house.loader.num_failures == len(house.read_names) == 8


def test_what_the_disk_says_is_an_adapters_error() -> None:
    house = House()
    house.register("gone")
    house.load("gone")
    with pytest.raises(AdapterInvalid, match="'gone' cannot be loaded: OSError: the disk is gone"):
        house.loader.missing(["gone"])


def test_another_digest_than_the_one_registered_is_refused() -> None:
    house = House()
    house.register("a", digest="b" * 64)
    house.load("a")
    with pytest.raises(AdapterInvalid, match="was registered with bbb"):
        house.loader.missing(["a"])
    house.register("a", digest="a")
    house.load("a")
    assert house.loader.missing(["a"]) == []


def test_a_name_that_nobody_knows_is_said() -> None:
    house = House()
    with pytest.raises(AdapterNotFound, match="no adapter 'x' is loaded"):
        house.loader.missing(["x"])


def test_a_resolver_is_asked_for_names_that_nobody_knows() -> None:
    asked = []

    def resolver(name: str) -> object:
        asked.append(name)
        if name == "raises":
            raise KeyError(name)
        return {"a": "a", "none": None, "wrong": 5}[name]

    house = House(resolver=resolver)
    assert house.loader.missing(["a"]) == house.loader.missing(["a"]) == ["a"]
    assert asked == ["a"]
    for name, words in (("none", "no adapter"), ("wrong", "gave no path but 5"), ("raises", "Key")):
        with pytest.raises(AdapterNotFound, match=words):
            house.loader.missing([name])


def test_a_load_that_nobody_wants_is_not_begun() -> None:
    house = House()
    house.register("a", "b", "c")
    house.gate.clear()
    house.loader.start(["a", "b", "c"])
    house.loader.drop_unwanted({"c"})
    house.gate.set()
    house.load()
    assert house.read_names == ["a", "c"]  # the first was being read


def test_a_source_that_is_replaced_while_it_is_read_brings_nothing() -> None:
    house = House()
    house.register("a")
    house.gate.clear()
    house.loader.start(["a"])
    house.loader.register("a", AdapterSource(Path("other")))
    house.gate.set()
    assert house.loader.missing(["a"]) == ["a"]
    house.load("a")
    assert house.store.resolve("a") == (("other", 1.0),)


def test_host_memory_is_bounded_by_what_was_not_used_for_longest() -> None:
    size = House()
    size.register("a")
    size.load("a")
    house = House(max_bytes=2 * size.store.host_bytes)
    house.store.load("mine", make_adapter("mine"))  # not from a source: it stays
    house.register("a", "b", "c")
    house.load("a")
    house.load("b")
    assert sorted(house.store.infos()) == ["b", "mine"]
    house.load("a", wanted=["a", "b"])  # both are wanted: more than the bound
    assert sorted(house.store.infos()) == ["a", "b", "mine"]
    house.loader.missing(["b"])  # used
    house.load("c")
    assert sorted(house.store.infos()) == ["c", "mine"]
    assert house.loader.num_evictions == 3
    assert house.loader.missing(["a", "b", "c"]) == ["a", "b"]


def test_what_a_request_holds_is_not_dropped() -> None:
    house = House(max_bytes=1)
    house.register("a", "b")
    house.load("a", wanted=["a"])
    mix = house.store.resolve("a")
    house.store.hold(mix)
    house.load("b")
    assert sorted(house.store.infos()) == ["a"]
    house.store.release(mix)
    house.load("b")
    assert sorted(house.store.infos()) == []


def test_a_pinned_adapter_stays_when_there_is_need_of_room() -> None:
    house = House(max_bytes=1)
    house.loader.register("a", AdapterSource("a", pinned=True))
    house.register("b")
    house.load("a", "b")
    assert sorted(house.store.infos()) == ["a"]
    assert house.loader.infos()["a"].pinned


def test_what_is_fetched_does_not_hold_up_what_is_read() -> None:
    house = House()
    house.loader.register("far", AdapterSource("hf://me/far"))
    house.gate.clear()
    house.loader.start(["far"])
    house.register("a")
    house.loader._read = lambda name, source: LoadedAdapter("a", make_host("a", house))
    house.loader.start(["a"])
    house.loader.wait(10)
    house.loader.take_in({"a"})
    assert (house.loader.state("a"), house.loader.state("far")) == ("loaded", "loading")
    house.gate.set()
    house.load()


def make_host(name: str, house: House) -> HostAdapter:
    return house.store.pack(name, make_adapter(name))


def test_a_registry_brings_names_and_takes_its_own_away() -> None:
    house = House()
    house.register("mine")
    a, b = AdapterSource("a"), AdapterSource("b")
    assert house.loader.sync({"a": a, "b": b}) == RegistryChanges(("a", "b"), ())
    house.load("a", "b")
    assert house.loader.sync({"a": a, "b": b}) == RegistryChanges((), ())
    assert house.loader.sync({"a": b}) == RegistryChanges(("a",), ("b",))
    assert list(house.loader.sources) == ["a", "mine"]
    assert house.store.infos() == {}
    house.load("a")
    assert house.store.resolve("a") == (("b", 1.0),)
    house.register("a")  # by hand: it is no longer the file's
    assert house.loader.sync({}) == RegistryChanges((), ())
    assert list(house.loader.sources) == ["a", "mine"]


def test_an_unloaded_name_counts_no_more() -> None:
    house = House(max_bytes=1)
    house.register("a", "b")
    house.load("a", wanted=["a"])
    house.store.unload("a")
    house.load("b", wanted=["b"])
    assert sorted(house.store.infos()) == ["b"]
    assert house.loader.forget("b")
    assert not house.loader.forget("b")
