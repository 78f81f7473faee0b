"""Which adapters are on the device, in which pages and slots, in order of use."""

from __future__ import annotations

from collections import Counter, OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from .rank_pages import AdapterTable, PackedSite, RankPagePool

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from torch import Tensor

    from .mix import Mix
    from .output_scales import PackedScales
    from .packed_adapter import PackedAdapter
    from .weight_changes import PackedRows


@dataclass(slots=True)
class _Slot:
    """A mix on the device."""

    slot: int
    pins: int = 0


@dataclass(slots=True)
class _Changes:
    """What the adapters of a mix do beside their deltas, with their weights."""

    scales: dict[str, list[tuple[PackedScales, float]]] = field(default_factory=dict)  # by site
    rows: dict[str, list[tuple[PackedRows, float]]] = field(default_factory=dict)  # by site
    norms: list[tuple[Tensor, float]] = field(default_factory=list)


class DeviceAdapterCache:
    """What is on the device: the pages of adapters, the slots of mixes, each in order of use.

    A mix on the device has all its adapters there; an adapter that mixes share is there once.
    """

    def __init__(self, pools: Mapping[str, RankPagePool], table: AdapterTable, slots: int) -> None:
        self.pools, self.table = pools, table
        self._num_slots = slots
        self._free_slots = list(range(slots))[::-1]
        self._pages: OrderedDict[str, dict[str, list[int]]] = OrderedDict()  # digest -> site -> ids
        self._mixes: OrderedDict[Mix, _Slot] = OrderedDict()
        self._slot_pages: list[Mapping[str, int]] = [{}] * slots  # by site, where there are any
        self.num_copies = 0  # of adapters to their pages, ever

    def pin(self, mix: Mix, packed: Mapping[str, PackedAdapter]) -> int | None:
        """Slot of the mix, or None with nothing changed. `packed` is by digest."""
        entry = self._mixes.get(mix)
        if entry is None:
            victims = self._find_victims(packed) if self._has_slot() else None
            if victims is None:
                return None
            for digest in victims:
                self.evict(digest)
            entry = self._enter(mix, packed)
        entry.pins += 1
        self._touch(mix)
        return entry.slot

    def has(self, digest: str) -> bool:
        """Whether the adapter's pages are on the device."""
        return digest in self._pages

    @property
    def pins(self) -> Counter[Mix]:
        """How often each mix is pinned."""
        return Counter({mix: entry.pins for mix, entry in self._mixes.items() if entry.pins})

    def reset(self) -> None:
        """Pins nothing, and frees what belongs to no adapter and no mix. Idempotent.

        An adapter or a mix is entered when all of it is written, and taken out before any of it
        is overwritten: the two tables say what is complete, whatever was raised in between.
        """
        for site, pool in self.pools.items():
            pool.reset(page for sites in self._pages.values() for page in sites.get(site, ()))
        for entry in self._mixes.values():
            entry.pins = 0
        used = {entry.slot for entry in self._mixes.values()}
        self._free_slots = [slot for slot in reversed(range(self._num_slots)) if slot not in used]
        for slot in self._free_slots:
            self.table.clear(slot)
            self._slot_pages[slot] = {}

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
        return frozenset[str]().union(*(self._slot_pages[s] for s in set(slots) if s >= 0))

    def most_pages(self, slots: Iterable[int]) -> int:
        """Pages that the widest of these slots has at one site."""
        counts = (self._slot_pages[slot].values() for slot in set(slots) if slot >= 0)
        return max((count for of_slot in counts for count in of_slot), default=0)

    def resident(self) -> Collection[Mix] | None:
        """The mixes in slots if all of these are pinned, so that no other can come; else None."""
        return None if self._has_slot() else self._mixes.keys()

    def _touch(self, mix: Mix) -> None:
        self._mixes.move_to_end(mix)
        for digest, _ in mix:
            self._pages.move_to_end(digest)

    def _pinned(self) -> set[str]:
        return {d for mix, entry in self._mixes.items() if entry.pins for d, _ in mix}

    def _has_slot(self) -> bool:
        return bool(self._free_slots) or any(not entry.pins for entry in self._mixes.values())

    def _find_victims(self, packed: Mapping[str, PackedAdapter]) -> list[str] | None:
        """Adapters to evict so that those of `packed` fit; None if that is not possible now."""
        lacking: Counter[str] = Counter()
        for digest, adapter in packed.items():
            if digest not in self._pages:
                lacking.update({site: one.num_pages for site, one in adapter.sites.items()})
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

    def _enter(self, mix: Mix, packed: Mapping[str, PackedAdapter]) -> _Slot:
        if not self._free_slots:
            self._evict_mix(next(m for m, entry in self._mixes.items() if not entry.pins))
        for digest, adapter in packed.items():
            if digest not in self._pages:
                self._pages[digest] = {s: self._copy(s, one) for s, one in adapter.sites.items()}
                self.num_copies += 1
        slot = self._free_slots.pop()
        rows = self._rows(mix)
        for site, (ids, weights) in rows.items():
            self.table.write(slot, site, ids, weights)
        changes = _changes(mix, packed)
        for site, scales in changes.scales.items():
            self.table.scales[site].write(slot, scales)
        for site, of_tokens in changes.rows.items():
            self.table.rows[site].write(slot, of_tokens)
        if changes.norms:
            self.table.norms.write(slot, changes.norms)
        self._slot_pages[slot] = {site: len(ids) for site, (ids, _) in rows.items()}
        entry = self._mixes[mix] = _Slot(slot)
        return entry

    def _copy(self, site: str, packed: PackedSite) -> list[int]:
        self.pools[site].reserve()  # also for biases alone
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
        self._slot_pages[entry.slot] = {}
        self._free_slots.append(entry.slot)

    def check_integrity(self, packed: Mapping[str, PackedAdapter]) -> None:
        """Asserts that pools, slots and table agree. `packed`: what is on the host."""
        for site, pool in self.pools.items():
            pool.check_integrity()
            ids = [page for sites in self._pages.values() for page in sites.get(site, ())]
            assert len(ids) == len(set(ids))
            assert pool.used == set(ids)
        for digest, pages in self._pages.items():
            assert {s: len(ids) for s, ids in pages.items()} == {
                s: one.num_pages for s, one in packed[digest].sites.items()
            }
        slots = [entry.slot for entry in self._mixes.values()]
        assert sorted(slots + self._free_slots) == list(range(self._num_slots))
        expected = {entry.slot: self._rows(mix) for mix, entry in self._mixes.items()}
        changed = {entry.slot: _changes(mix, packed) for mix, entry in self._mixes.items()}
        assert all(entry.pins >= 0 for entry in self._mixes.values())
        for slot in range(self._num_slots):
            rows = expected.get(slot, {})
            assert self._slot_pages[slot] == {site: len(ids) for site, (ids, _) in rows.items()}
            changes = changed.get(slot, _Changes())
            assert self.table.norms.has_row(slot) == bool(changes.norms)
            for site, of_tokens in self.table.rows.items():
                assert of_tokens.has_row(slot) == (site in changes.rows)
            for site in self.pools:
                assert self.table.scales[site].has_row(slot) == (site in changes.scales)
                ids, weights = rows.get(site, ([], []))
                assert self.table.row(slot, site) == (
                    ids,
                    torch.tensor(weights, dtype=torch.float32).tolist(),
                )


def _changes(mix: Mix, packed: Mapping[str, PackedAdapter]) -> _Changes:
    found = _Changes()
    for digest, weight in mix:
        for site, one in packed[digest].sites.items():
            if one.scales is not None:
                found.scales.setdefault(site, []).append((one.scales, weight))
            if one.rows is not None:
                found.rows.setdefault(site, []).append((one.rows, weight))
        if (norms := packed[digest].norms) is not None:
            found.norms.append((norms, weight))
    return found
