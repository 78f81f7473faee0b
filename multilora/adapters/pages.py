"""Rank pages: where LoRA weights live while they are used, and the table that says which are whose.

A page is 8 rank rows of one adapter at one site, over all its layers and slices. Every site has a
pool of pages; a slot of the table is a list of pages with a weight for each. Adapters that do not
target a site have no page there: no bytes and no work.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from multilora_kernels import Table, empty_huge

from ..errors import AdapterInvalid

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch import Tensor

    from ..request import Mix
    from ..sites import Site
    from .format import Adapter

PAGE_ROWS = 8


@dataclass(frozen=True, slots=True)
class PackedSite:
    """One adapter at one site in page layout; host memory, the scale inside B."""

    a: Tensor  # [pages, layers, slices, 8, in]; for the embedding [pages, vocab, 8]
    b: Tensor  # [pages, layers, 8, out]

    @property
    def num_pages(self) -> int:
        """Rank pages of the adapter at the site."""
        return self.a.shape[0]

    @property
    def num_bytes(self) -> int:
        """Bytes of both tensors."""
        return self.a.nbytes + self.b.nbytes


def pages_for(rank: int) -> int:
    """Pages that hold so many rank rows."""
    return -(-rank // PAGE_ROWS)


def pack(adapter: Adapter, site: Site, dtype: torch.dtype) -> PackedSite | None:
    """Lays the adapter's weights at one site out as pages; None if it does not target the site.

    Rows above a module's rank, and layers and slices without LoRA, are zero. The scale is folded
    into B in fp32 before the one cast to `dtype`. Raises AdapterInvalid if a value overflows.
    """
    pages = pages_for(adapter.rank_at(site.name))
    if not pages:
        return None
    rows = pages * PAGE_ROWS
    a = torch.zeros(site.layers, len(site.slices), rows, site.in_, dtype=dtype)
    b = torch.zeros(site.layers, rows, site.out, dtype=dtype)
    starts = site.slice_starts
    for (name, layer, index), module in adapter.modules.items():
        if name != site.name:
            continue
        rank = module.a.shape[0]
        a[layer, index, :rank] = module.a.to(dtype)
        scaled = (module.b.float() * module.scale).to(dtype)
        b[layer, :rank, starts[index] : starts[index + 1]] = scaled.T
    if not all(math.isfinite(end) for values in (a, b) for end in torch.aminmax(values)):
        raise AdapterInvalid(
            f"the adapter's weights at site {site.name} (A, or alpha / r times B) overflow "
            f"{dtype}; lower its lora_alpha, or start with lora_dtype='float32'"
        )
    if site.name == "embed":  # looked up by token: a token's 8 values lie side by side
        a_pages = a.view(pages, PAGE_ROWS, site.in_).transpose(1, 2)
    else:
        a = a.view(site.layers, len(site.slices), pages, PAGE_ROWS, site.in_)
        a_pages = a.permute(2, 0, 1, 3, 4)
    b_pages = b.view(site.layers, pages, PAGE_ROWS, site.out).transpose(0, 1)
    return PackedSite(a_pages.contiguous(), b_pages.contiguous())


class SitePool:
    """The pages of one site on the device. It takes memory only once an adapter needs the site."""

    def __init__(
        self,
        site: Site,
        capacity: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        self.capacity = capacity
        self._dtype, self._device = dtype, device
        self._a_shape: tuple[int, ...] = (site.layers, len(site.slices), PAGE_ROWS, site.in_)
        self._by_token = site.name == "embed"
        if self._by_token:
            self._a_shape = (site.in_, PAGE_ROWS)
        self._b_shape = (site.layers, PAGE_ROWS, site.out)
        self._pages: tuple[Tensor, Tensor] | None = None
        self._free = list(range(capacity))[::-1]
        self._used: set[int] = set()

    @property
    def num_free(self) -> int:
        """Pages that `allocate` can still give."""
        return len(self._free)

    @property
    def used(self) -> frozenset[int]:
        """Ids of the pages in use."""
        return frozenset(self._used)

    @property
    def is_allocated(self) -> bool:
        """Whether an adapter has ever needed the site; before that `layer` has nothing to give."""
        return self._pages is not None

    @property
    def num_bytes(self) -> int:
        """Bytes of the pages in use."""
        return len(self._used) * self.page_bytes

    @property
    def page_bytes(self) -> int:
        """Bytes of one page."""
        return (math.prod(self._a_shape) + math.prod(self._b_shape)) * self._dtype.itemsize

    def reserve(self) -> None:
        """Takes the memory of all pages, which then stays in place."""
        if self._pages is None:
            a_shape, b_shape = (self.capacity, *self._a_shape), (self.capacity, *self._b_shape)
            self._pages = (
                empty_huge(a_shape, self._dtype, self._device),
                empty_huge(b_shape, self._dtype, self._device),
            )

    def allocate(self, count: int) -> list[int] | None:
        """Ids of `count` free pages, undefined in content; None if there are not so many."""
        if count > len(self._free):
            return None
        if count:
            self.reserve()
        ids = [self._free.pop() for _ in range(count)]
        self._used.update(ids)
        return ids

    def free(self, page_ids: Iterable[int]) -> None:
        """Takes pages back."""
        for page in page_ids:
            assert page in self._used, f"page {page} is not in use"
            self._used.remove(page)
            self._free.append(page)

    def write(self, page_ids: Sequence[int], packed: PackedSite) -> None:
        """Fills allocated pages, in the order of `page_ids`."""
        assert self._pages is not None
        assert len(page_ids) == packed.num_pages
        assert self._used.issuperset(page_ids)
        index = torch.tensor(page_ids, device=self._device)
        for pages, values in zip(self._pages, (packed.a, packed.b), strict=True):
            pages.index_copy_(0, index, values.to(self._device))

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Views of one layer: A `[pages, slices, 8, in]`, B `[pages, 8, out]`.

        The embedding's A is `[pages, vocab, 8]`. Pages that are not in use hold anything.
        """
        assert self._pages is not None, "no adapter has needed this site yet"
        a, b = self._pages
        return (a if self._by_token else a[:, index]), b[:, index]

    def check_integrity(self) -> None:
        """Asserts that every page is either free or in use."""
        assert len(self._free) + len(self._used) == self.capacity
        assert self._used.union(self._free) == set(range(self.capacity))


class AdapterTable:
    """For each site and slot: which pages, with which weights."""

    def __init__(
        self,
        sites: Iterable[str],
        slots: int,
        max_pages: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self._tables = {
            name: Table(
                page_ids=torch.zeros(slots, max_pages, dtype=torch.int32, device=device),
                page_weights=torch.zeros(slots, max_pages, dtype=torch.float32, device=device),
                num_pages=torch.zeros(slots, dtype=torch.int32, device=device),
            )
            for name in sites
        }

    def site(self, name: str) -> Table:
        """The table of one site; what the kernels take. Its tensors stay the same for good."""
        return self._tables[name]

    def write(
        self,
        slot: int,
        site: str,
        page_ids: Sequence[int],
        weights: Sequence[float],  # one for each page
    ) -> None:
        """Makes `page_ids` the pages of a slot at a site."""
        table, count = self._tables[site], len(page_ids)
        assert count == len(weights) <= table.page_ids.shape[1]
        table.page_ids[slot, :count] = torch.tensor(page_ids, dtype=torch.int32)
        table.page_weights[slot, :count] = torch.tensor(weights, dtype=torch.float32)
        table.num_pages[slot] = count

    def clear(self, slot: int) -> None:
        """Leaves a slot without pages at every site."""
        for table in self._tables.values():
            table.num_pages[slot] = 0

    def row(self, slot: int, site: str) -> tuple[list[int], list[float]]:
        """Page ids and weights of a slot at a site, as `write` got them (weights in fp32)."""
        table = self._tables[site]
        count = int(table.num_pages[slot])
        return table.page_ids[slot, :count].tolist(), table.page_weights[slot, :count].tolist()


@dataclass(slots=True)
class _Slot:
    """A mix on the device."""

    slot: int
    pins: int = 0


class Residents:
    """What is on the device: the pages of adapters, the slots of mixes, each in order of use.

    A mix on the device has all its adapters there; an adapter that mixes share is there once.
    """

    def __init__(self, pools: Mapping[str, SitePool], table: AdapterTable, slots: int) -> None:
        self.pools, self.table = pools, table
        self._num_slots = slots
        self._free_slots = list(range(slots))[::-1]
        self._pages: OrderedDict[str, dict[str, list[int]]] = OrderedDict()  # digest -> site -> ids
        self._mixes: OrderedDict[Mix, _Slot] = OrderedDict()
        self._slot_sites = [frozenset[str]()] * slots

    def pin(self, mix: Mix, packed: Mapping[str, Mapping[str, PackedSite]]) -> int | None:
        """Slot of the mix, or None with nothing changed. `packed` is by digest, then by site."""
        entry = self._mixes.get(mix)
        if entry is None:
            victims = self._find_victims(packed)
            if victims is None or not self._has_slot():
                return None
            for digest in victims:
                self.evict(digest)
            entry = self._enter(mix, packed)
        entry.pins += 1
        self._touch(mix)
        return entry.slot

    def unpin(self, mix: Mix) -> None:
        """Ends one pin."""
        entry = self._mixes[mix]
        assert entry.pins > 0
        entry.pins -= 1
        self._touch(mix)

    def is_pinned(self, digest: str) -> bool:
        """Whether a pinned mix uses the adapter."""
        return digest in self._pinned()

    def evict(self, digest: str) -> None:
        """Frees the adapter's pages and the slots of mixes that use it; none may be pinned."""
        for mix in [m for m in self._mixes if any(d == digest for d, _ in m)]:
            self._evict_mix(mix)
        for site, ids in self._pages.pop(digest, {}).items():
            self.pools[site].free(ids)

    def active_sites(self, slots: Iterable[int]) -> frozenset[str]:
        """Sites that any of these slots adapts."""
        return frozenset[str]().union(*(self._slot_sites[s] for s in set(slots) if s >= 0))

    def _touch(self, mix: Mix) -> None:
        self._mixes.move_to_end(mix)
        for digest, _ in mix:
            self._pages.move_to_end(digest)

    def _pinned(self) -> set[str]:
        return {d for mix, entry in self._mixes.items() if entry.pins for d, _ in mix}

    def _has_slot(self) -> bool:
        return bool(self._free_slots) or any(not entry.pins for entry in self._mixes.values())

    def _find_victims(self, packed: Mapping[str, Mapping[str, PackedSite]]) -> list[str] | None:
        """Adapters to evict so that those of `packed` fit; None if that is not possible now."""
        lacking: Counter[str] = Counter()
        for digest, sites in packed.items():
            if digest not in self._pages:
                lacking.update({site: found.num_pages for site, found in sites.items()})
        for site in lacking:
            lacking[site] -= self.pools[site].num_free
        lacking = +lacking  # only where there is too little
        kept, victims = self._pinned().union(packed), []
        for digest, pages in self._pages.items():
            if not lacking:
                break
            if digest not in kept and not lacking.keys().isdisjoint(pages):
                victims.append(digest)
                lacking -= Counter({site: len(ids) for site, ids in pages.items()})
        return None if lacking else victims

    def _enter(self, mix: Mix, packed: Mapping[str, Mapping[str, PackedSite]]) -> _Slot:
        if not self._free_slots:
            self._evict_mix(next(m for m, entry in self._mixes.items() if not entry.pins))
        for digest, sites in packed.items():
            if digest not in self._pages:
                self._pages[digest] = {s: self._copy(s, found) for s, found in sites.items()}
        slot = self._free_slots.pop()
        rows = self._rows(mix)
        for site, (ids, weights) in rows.items():
            self.table.write(slot, site, ids, weights)
        self._slot_sites[slot] = frozenset(rows)
        entry = self._mixes[mix] = _Slot(slot)
        return entry

    def _copy(self, site: str, packed: PackedSite) -> list[int]:
        ids = self.pools[site].allocate(packed.num_pages)
        assert ids is not None
        self.pools[site].write(ids, packed)
        return ids

    def _rows(self, mix: Mix) -> dict[str, tuple[list[int], list[float]]]:
        """Page ids and weights by site: the adapters' pages one after the other."""
        rows: dict[str, tuple[list[int], list[float]]] = {}
        for digest, weight in mix:
            for site, pages in self._pages[digest].items():
                ids, weights = rows.setdefault(site, ([], []))
                ids += pages
                weights += [weight] * len(pages)
        return rows

    def _evict_mix(self, mix: Mix) -> None:
        entry = self._mixes.pop(mix)
        assert not entry.pins
        self.table.clear(entry.slot)
        self._slot_sites[entry.slot] = frozenset()
        self._free_slots.append(entry.slot)

    def check_integrity(self, packed: Mapping[str, Mapping[str, PackedSite]]) -> None:
        """Asserts that pools, slots and table agree. `packed`: what is on the host."""
        for site, pool in self.pools.items():
            pool.check_integrity()
            ids = [page for sites in self._pages.values() for page in sites.get(site, ())]
            assert len(ids) == len(set(ids))
            assert pool.used == set(ids)
        for digest, pages in self._pages.items():
            assert {s: len(ids) for s, ids in pages.items()} == {
                s: found.num_pages for s, found in packed[digest].items()
            }
        slots = [entry.slot for entry in self._mixes.values()]
        assert sorted(slots + self._free_slots) == list(range(self._num_slots))
        expected = {entry.slot: self._rows(mix) for mix, entry in self._mixes.items()}
        assert all(entry.pins >= 0 for entry in self._mixes.values())
        for slot in range(self._num_slots):
            rows = expected.get(slot, {})
            assert self._slot_sites[slot] == rows.keys()
            for site in self.pools:
                ids, weights = rows.get(site, ([], []))
                assert self.table.row(slot, site) == (
                    ids,
                    torch.tensor(weights, dtype=torch.float32).tolist(),
                )
