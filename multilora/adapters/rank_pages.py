"""Rank pages: where LoRA weights live while they are used, and the table that says which are whose.

A page is 8 rank rows of one adapter at one site, over all its layers and slices. Every site has a
pool of pages; a slot of the table is a list of pages with a weight for each. Adapters that do not
target a site have no page there: no bytes and no work.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from multilora_kernels import (
    PAGE_ROWS,
    LoraWeights,
    Table,
    empty_huge,
    pages_for,
    write_lora_,
)

from ..config.lora_sites import num_norms
from ..errors import AdapterInvalid
from .output_scales import PackedScales, ScaleRows, dora_gains, needs_base, pack_scales
from .weight_changes import NormChanges, PackedRows, RowChanges, pack_rows

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from torch import Tensor

    from ..config.lora_sites import Site
    from .packed_adapter import ServedBase
    from .peft.reader import Adapter, TokenRows


COLUMNS = 16
"""Columns of a table come in so many: for a number that 16 does not divide Triton compiles anew."""


@dataclass(frozen=True, slots=True)
class PackedSite:
    """One adapter at one site in page layout; host memory, the scale inside B."""

    a: Tensor  # [pages, layers, slices, 8, in]; for the embedding [pages, vocab, 8]
    b: Tensor  # [pages, layers, 8, out]
    scales: PackedScales | None = None
    rows: PackedRows | None = None  # of the embedding or the head

    @property
    def num_pages(self) -> int:
        """Rank pages of the adapter at the site."""
        return self.a.shape[0]

    @property
    def num_bytes(self) -> int:
        """Bytes of all its tensors."""
        scales = 0 if self.scales is None else self.scales.num_bytes
        rows = 0 if self.rows is None else self.rows.change.nbytes
        return self.a.nbytes + self.b.nbytes + scales + rows


def pack(
    adapter: Adapter,
    site: Site,
    dtype: torch.dtype,
    base: ServedBase | None = None,
    trained: TokenRows | None = None,  # rows that it puts in place of the base's
) -> PackedSite | None:
    """Lays the adapter's weights at one site out as pages; None if it does nothing at the site.

    Rows above a module's rank, and layers and slices without LoRA, are zero. The scale, and DoRA's
    gain, are folded into B in fp32 before the one cast to `dtype`. `base` is looked at for DoRA,
    trained biases and rows. Raises AdapterInvalid if a value overflows.
    """
    needed = needs_base(adapter) or trained is not None
    assert base is not None or not needed, "without the base DoRA would be ignored"
    gains = {} if base is None else dora_gains(adapter, site, base)
    scales = pack_scales(adapter, site, gains, base)
    pages = pages_for(adapter.rank_at(site.name))
    if not pages and scales is None and trained is None:
        return None
    if gains and trained is not None:
        raise AdapterInvalid(
            f"use_dora at {site.module_path(0, 0)} is refused where rows of it were trained, too: "
            "the lengths would be those of another weight; leave it out of target_modules"
        )
    a = torch.zeros(pages, *a_shape(site), dtype=dtype)
    b = torch.zeros(pages, site.layers, PAGE_ROWS, site.out, dtype=dtype)
    rows = a.mT[:, None, None] if site.name == "embed" else a  # [pages, layers, slices, 8, in]
    starts = site.slice_starts
    for (name, layer, index), module in adapter.modules.items():
        if name == site.name:
            columns = b[:, layer, :, starts[index] : starts[index + 1]]
            gain = gains.get((name, layer, index))
            wide = module.b if gain is None else module.b.float() * gain[:, None]
            write_lora_(rows[:, layer, index], columns, LoraWeights(module.a, wide, module.scale))
    if pages and not all(math.isfinite(end) for values in (a, b) for end in torch.aminmax(values)):
        raise AdapterInvalid(
            f"the adapter's weights at site {site.name} (A, or alpha / r times B) overflow "
            f"{dtype}; lower its lora_alpha, or start with lora_dtype='float32'"
        )
    own = None if trained is None or base is None else pack_rows(trained, site.name, dtype, base)
    return PackedSite(a, b, scales, own)


def a_shape(site: Site) -> tuple[int, ...]:
    """The A of one page. The embedding's is looked up by token: 8 values side by side for each."""
    if site.name == "embed":
        return (site.in_, PAGE_ROWS)
    return (site.layers, len(site.slices), PAGE_ROWS, site.in_)


class RankPagePool:
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
        self._a_shape, self._by_token = a_shape(site), site.name == "embed"
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
            self._pages = self._empty(self.capacity)

    @contextmanager
    def stand_in(self) -> Iterator[None]:
        """Within, a pool that has no memory yet has that of one page, for steps of nothing."""
        before = self._pages
        if before is None:
            self._pages = self._empty(1)
        try:
            yield
        finally:
            self._pages = before

    def _empty(self, count: int) -> tuple[Tensor, Tensor]:
        shapes = (count, *self._a_shape), (count, *self._b_shape)
        a, b = (empty_huge(shape, self._dtype, self._device) for shape in shapes)
        return a, b

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

    def reset(self, used: Iterable[int]) -> None:
        """Makes these the pages in use, and all others free."""
        self._used = set(used)
        self._free = [page for page in reversed(range(self.capacity)) if page not in self._used]

    def write(self, page_ids: Sequence[int], packed: PackedSite) -> None:
        """Fills allocated pages, in the order of `page_ids`."""
        assert self._pages is not None
        assert len(page_ids) == packed.num_pages
        assert self._used.issuperset(page_ids)
        for pages, values in zip(self._pages, (packed.a, packed.b), strict=True):
            for page, own in zip(page_ids, values, strict=True):
                pages[page].copy_(own)  # on a CPU three times as fast as one index_copy_

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
    """For each site and slot: which pages, with which weights, and all else that a slot changes."""

    def __init__(
        self,
        sites: Mapping[str, Site],
        slots: int,
        max_pages: int,
        device: torch.device | str = "cpu",
        *,
        max_rows: int,  # of the embedding, and of the head, that a slot may change
        dtype: torch.dtype,  # of those
    ) -> None:
        hidden = sites["qkv"].in_
        self.norms = NormChanges(num_norms(sites), slots, hidden, device)
        self.rows = {
            name: RowChanges(site, slots, hidden, max_rows, dtype=dtype, device=device)
            for name, site in sites.items()
            if not site.in_layers
        }
        self._tables = {
            name: Table(
                page_ids=torch.zeros(slots, max_pages, dtype=torch.int32, device=device),
                page_weights=torch.zeros(slots, max_pages, dtype=torch.float32, device=device),
                num_pages=torch.zeros(slots, dtype=torch.int32, device=device),
            )
            for name in sites
        }
        self.scales = {name: ScaleRows(site, slots, device) for name, site in sites.items()}

    def site(self, name: str, pages: int | None = None) -> Table:
        """The table of one site; what the kernels take. Its tensors stay the same for good.

        With `pages`, views of its first columns, for a step whose slots have no more pages: what
        kernels keep of a token has room for as many.
        """
        table = self._tables[name]
        if pages is None:
            return table
        columns = -(-pages // COLUMNS) * COLUMNS
        ids, weights = table.page_ids[:, :columns], table.page_weights[:, :columns]
        return table._replace(page_ids=ids, page_weights=weights)

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
        for name, table in self._tables.items():
            table.num_pages[slot] = 0
            self.scales[name].clear(slot)
        for rows in self.rows.values():
            rows.clear(slot)
        self.norms.clear(slot)

    def row(self, slot: int, site: str) -> tuple[list[int], list[float]]:
        """Page ids and weights of a slot at a site, as `write` got them (weights in fp32)."""
        table = self._tables[site]
        count = int(table.num_pages[slot])
        return table.page_ids[slot, :count].tolist(), table.page_weights[slot, :count].tolist()
