"""An adapter of one base, in page layout: its sites, rows and norms, and their bytes."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from multilora.adapters.packed_adapter import needs_slot_memory, pack_adapter
from multilora.adapters.peft.reader import TokenRows
from multilora.adapters.store import AdapterStore
from multilora.config.engine import EngineConfig
from multilora.errors import AdapterInvalid, AdapterTooLarge
from tests.harness.small_stores import SITES, load, make_adapter, make_store


class Base:
    """A base of zeros."""

    def token_rows(self, site: str, ids: Tensor) -> Tensor:
        return torch.zeros(len(ids), 4)

    def norm_weight(self, index: int) -> Tensor:
        return torch.zeros(4)

    def columns(self, site: str, layer: int, first: int, last: int) -> Tensor:
        return torch.ones(last - first, SITES[site].in_)

    def bias(self, site: str, layer: int) -> Tensor | None:
        return None


ROWS = TokenRows(torch.tensor([3, 7]), torch.ones(2, 4))


def test_sites_rows_and_norms_are_packed() -> None:
    adapter = dataclasses.replace(make_adapter("d"), norms={4: torch.ones(4)}, invocation=(5,))
    found = pack_adapter(adapter, SITES, torch.float32, Base(), {"embed": ROWS})
    assert found.sites.keys() == {"embed", "qkv"}
    embed = found.sites["embed"]
    assert embed.num_pages == 0
    assert embed.rows is not None
    assert torch.equal(embed.rows.change, ROWS.values)
    assert found.norms is not None
    assert found.norms.shape == (5, 4)
    assert found.num_bytes == found.sites["qkv"].num_bytes + 2 * 4 * 4 + 5 * 4 * 4
    assert (found.rank, found.invocation) == (8, (5,))


def test_a_plain_adapter_needs_no_base() -> None:
    found = pack_adapter(make_adapter("d"), SITES, torch.float32, None, {})
    assert found.norms is None
    assert not needs_slot_memory(make_adapter("d"))


def test_dora_of_a_weight_whose_rows_were_trained_is_refused() -> None:
    adapter = make_adapter("d", sites=("embed",))
    modules = {
        key: dataclasses.replace(module, magnitude=torch.ones(4))
        for key, module in adapter.modules.items()
    }
    adapter = dataclasses.replace(adapter, modules=modules)
    assert needs_slot_memory(adapter)
    with pytest.raises(AdapterInvalid, match=r"use_dora at model\.embed_tokens is refused"):
        pack_adapter(adapter, SITES, torch.float32, Base(), {"embed": ROWS})


def test_rows_and_norms_come_to_the_device_and_go() -> None:
    store = make_store(max_loras=1)
    changed = dataclasses.replace(
        make_adapter("a"), norms={0: torch.ones(4)}, token_rows={"embed": ROWS}
    )
    store.load("a", changed, served=Base())
    load(store, "b")
    assert not store.needs_token_slots
    for name, has_changes in (("a", True), ("b", False), ("a", True)):
        mix = store.resolve(name)
        assert store.pin(mix) == 0
        store.check_integrity()
        assert store.needs_token_slots
        assert store.table.norms.has_row(0) == has_changes
        assert store.table.rows["embed"].has_row(0) == has_changes
        store.unpin(mix)


def test_a_mix_of_too_many_rows_is_refused() -> None:
    store = make_store(max_lora_token_rows=3)
    for name, ids in (("a", [3, 7]), ("b", [7, 8]), ("c", [1, 2])):
        rows = TokenRows(torch.tensor(ids), torch.ones(2, 4))
        adapter = dataclasses.replace(make_adapter(name), token_rows={"embed": rows})
        store.load(name, adapter, served=Base())
    store.resolve({"a": 1.0, "b": 1.0})
    with pytest.raises(AdapterTooLarge, match="change 4 rows of one weight, above max_lora_token"):
        store.resolve({"a": 1.0, "c": 1.0})


def test_on_a_gpu_norms_need_memory_that_was_set_aside() -> None:
    adapter = dataclasses.replace(make_adapter("a"), norms={0: torch.ones(4)})
    for scales in (None, True):
        config = EngineConfig(model="m", max_loras=2, lora_scales=scales)
        store = AdapterStore(SITES, config, dtype=torch.float32, is_gpu=True)
        if scales:
            store.reserve()
            assert store.needs_token_slots
            store.load("a", adapter, served=Base())
        else:
            with pytest.raises(AdapterInvalid, match="trained norms, for which there is no memory"):
                store.load("a", adapter, served=Base())
