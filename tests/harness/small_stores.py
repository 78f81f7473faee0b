"""Adapter stores of three small sites, the adapters to fill them, and what they must hold."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from multilora.adapters.peft.reader import Adapter, LoraModule
from multilora.adapters.rank_pages import pack
from multilora.adapters.store import AdapterStore
from multilora.config.engine import EngineConfig
from multilora.config.lora_sites import Site, Slice

if TYPE_CHECKING:
    from collections.abc import Sequence

SITES = {
    "embed": Site("embed", "", (Slice("embed_tokens", 4),), 12, 1),
    "qkv": Site("qkv", "self_attn", (Slice("q_proj", 4), Slice("k_proj", 2)), 4, 2),
    "o": Site("o", "self_attn", (Slice("o_proj", 4),), 4, 2),
}


def make_adapter(digest: str, *, rank: int = 8, sites: Sequence[str] = ("qkv",)) -> Adapter:
    """Random weights in the first slice of the last layer of each site."""
    generator = torch.Generator().manual_seed(int.from_bytes(digest.encode(), "big") % 2**60)
    modules = {
        (name, SITES[name].layers - 1, 0): LoraModule(
            torch.randn(rank, SITES[name].in_, generator=generator),
            torch.randn(SITES[name].slices[0].out, rank, generator=generator),
            2.0,
        )
        for name in sites
    }
    return Adapter(digest, modules, rank)


def make_store(**config: Any) -> AdapterStore:
    whole = EngineConfig(model="m", **{"max_loras": 2, "max_lora_rank": 32, **config})
    return AdapterStore(SITES, whole, dtype=torch.float32)


def load(store: AdapterStore, *digests: str, **fields: Any) -> None:
    """Loads an adapter of each digest under its digest's name."""
    for digest in digests:
        assert store.load(digest, make_adapter(digest, **fields)) == digest


def device_state(store: AdapterStore) -> list[object]:
    """All that a failed `pin` must leave as it was."""
    tables = [t.clone().tolist() for s in SITES for t in store.table.site(s)[:3]]
    return [*tables, *(store.pool(s).used for s in SITES)]


def check_content(store: AdapterStore, slot: int, parts: Sequence[tuple[Adapter, float]]) -> None:
    """Asserts that the slot's pages are the bytes of these adapters, one after the other."""
    for name, site in SITES.items():
        ids, weights = store.table.row(slot, name)
        packed = [(pack(adapter, site, torch.float32), weight) for adapter, weight in parts]
        found = [(p, weight) for p, weight in packed if p is not None]
        assert weights == [w for p, w in found for _ in range(p.num_pages)]
        if not found:
            continue
        for layer in range(site.layers):
            a, b = store.pool(name).layer(layer)
            wanted = torch.cat([p.a if name == "embed" else p.a[:, layer] for p, _ in found])
            assert torch.equal(a[ids], wanted)
            assert torch.equal(b[ids], torch.cat([p.b[:, layer] for p, _ in found]))
