"""The loaded adapters: names and versions on the host, and which mixes are on the device.

Names lead to digests. A digest stays on the host while a name, a request (`hold`) or a running
sequence (`pin`) needs it, so that reloading a name never changes a request in flight.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from multilora_kernels import PAGE_ROWS, pages_for

from ..errors import (
    AdapterInvalid,
    AdapterNotFound,
    AdapterTooLarge,
)
from .activation import Activation, activate
from .base_weights import changed_rows
from .device_cache import DeviceAdapterCache
from .mix import AdapterSpec, Mix, check_name, check_version, check_weight, weights_of
from .packed_adapter import PackedAdapter, check_mix, needs_slot_memory, pack_adapter
from .rank_pages import AdapterTable, RankPagePool

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Sequence

    from torch import Tensor

    from ..config.engine import EngineConfig
    from ..config.lora_sites import Site
    from .mix import Mix
    from .packed_adapter import ServedBase
    from .peft.reader import Adapter


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """What is known of a loaded adapter."""

    name: str
    digest: str
    rank: int  # largest of any module
    num_bytes: int  # of its rank pages
    on_device: bool  # whether its pages lie there now


class AdapterStore:
    """All adapters of one engine."""

    def __init__(
        self,
        sites: Mapping[str, Site],
        config: EngineConfig,
        *,
        dtype: torch.dtype,  # of the rank pages
        device: torch.device | str = "cpu",
        is_gpu: bool = False,  # whether there are as many pages as on a GPU
    ) -> None:
        self._sites, self._config, self._dtype, self._is_gpu = sites, config, dtype, is_gpu
        self._names: dict[str, str] = {}  # name -> digest
        self._host: dict[str, PackedAdapter] = {}  # by digest
        self._holds: Counter[str] = Counter()  # by digest
        self._capacity = config.pages_per_site(is_gpu)
        pools = {
            name: RankPagePool(site, self._capacity, dtype=dtype, device=device)
            for name, site in sites.items()
        }
        table = AdapterTable(
            sites,
            config.max_loras,
            config.max_lora_rank // PAGE_ROWS,
            device,
            max_rows=config.max_lora_token_rows,
            dtype=dtype,
        )
        self._device = DeviceAdapterCache(pools, table, config.max_loras)

    # Names -----------------------------------------------------------------------------------

    def load(
        self,
        name: str,
        adapter: Adapter,
        *,
        base: Mapping[str, Tensor] | None = None,
        served: ServedBase | None = None,
    ) -> str:
        """Makes `name` mean this adapter from now on, and returns its digest.

        Raises like `pack`, which it is with `install`; then nothing has changed.
        """
        self.install(name, adapter.digest, self.pack(name, adapter, base=base, served=served))
        return adapter.digest

    def pack(
        self,
        name: str,
        adapter: Adapter,
        *,
        base: Mapping[str, Tensor] | None = None,
        served: ServedBase | None = None,
    ) -> PackedAdapter:
        """The adapter in page layout, which changes nothing here.

        `base` holds the base model's own "embed" and "lm_head" weights, for an adapter that brings
        such weights; `served` are the weights as they are served, for DoRA and all that is trained
        in full. Raises AdapterError for a name that is not allowed, AdapterInvalid, or
        AdapterTooLarge.
        """
        check_name(name)
        self._check_size(name, adapter)
        if needs_slot_memory(adapter) and not self._config.has_lora_scales(self._is_gpu):
            raise AdapterInvalid(
                f"adapter {name!r} has DoRA, biases or trained norms, for which there is no "
                "memory; restart with lora_scales=True"
            )
        if adapter.digest in self._host:
            return self._host[adapter.digest]
        rows = changed_rows(name, adapter, base or {}, self._config.max_lora_token_rows)
        try:
            return pack_adapter(adapter, self._sites, self._dtype, served, rows)
        except AdapterInvalid as error:
            raise AdapterInvalid(f"adapter {name!r}: {error}") from error

    def install(self, name: str, digest: str, host: PackedAdapter) -> None:
        """Makes `name` mean what was packed."""
        self._host.setdefault(digest, host)
        old = self._names.get(name)
        self._names[name] = digest
        if old is not None:
            self._drop_unneeded([old])

    def unload(self, name: str) -> None:
        """Forgets a name. Requests in flight keep the adapter until they end."""
        self._drop_unneeded([self._forget(name)])

    def infos(self) -> dict[str, AdapterInfo]:
        """The loaded adapters by name, sorted."""
        return {
            name: AdapterInfo(name, digest, host.rank, host.num_bytes, self._device.has(digest))
            for name, digest in sorted(self._names.items())
            for host in (self._host[digest],)
        }

    def has(self, name: str) -> bool:
        """Whether an adapter is loaded under this name."""
        return name in self._names

    def is_needed(self, name: str) -> bool:
        """Whether a request holds the adapter of this name."""
        return self._is_needed(self._digest(name))

    @property
    def host_bytes(self) -> int:
        """Bytes of the packed adapters on the host."""
        return sum(host.num_bytes for host in self._host.values())

    def _forget(self, name: str) -> str:
        digest = self._digest(name)
        del self._names[name]
        return digest

    def _digest(self, name: str) -> str:
        digest = self._names.get(name)
        if digest is None:
            raise AdapterNotFound(f"no adapter {name[:140]!r} is loaded; {_some(self._names)}")
        return digest

    # Requests --------------------------------------------------------------------------------

    def resolve(self, adapter: AdapterSpec) -> Mix:
        """The mix that a request means by `adapter`; None and {} are the base.

        Raises RequestError for a wrong weight or type, AdapterNotFound for an unknown name, and
        AdapterTooLarge or CapacityError for a mix that can never be on the device.
        """
        weights: dict[str, list[float]] = {}
        for name, weight in weights_of(adapter).items():
            digest = self._digest(name.partition("@")[0])
            check_version(name, digest)
            weights.setdefault(digest, []).append(weight)
        # fsum, since the order of the names must not matter
        mix = tuple((d, total) for d, ws in sorted(weights.items()) if (total := math.fsum(ws)))
        for digest, total in mix:
            check_weight(digest, total)
        check_mix([self._host[digest] for digest, _ in mix], self._config, self._capacity)
        return mix

    def acquire(self, adapter: AdapterSpec, prompt_ids: Sequence[int] = ()) -> Activation:
        """`resolve`, `activate` and `hold`, of which it raises what they do."""
        mix = self.resolve(adapter)
        invocation = self._host[mix[0][0]].invocation if mix else ()
        found = activate(mix, invocation, prompt_ids, self._config.alora_missing)
        self.hold(found.mix)
        return found

    def hold(self, mix: Mix) -> None:
        """Keeps the mix's adapters on the host until `release`."""
        assert self.ready(mix)
        self._holds.update(digest for digest, _ in mix)

    def release(self, mix: Mix) -> None:
        """Ends one `hold`."""
        for digest, _ in mix:
            assert self._holds[digest] > 0
            self._holds[digest] -= 1
            if not self._holds[digest]:
                del self._holds[digest]
        self._drop_unneeded(digest for digest, _ in mix)

    def ready(self, mix: Mix) -> bool:
        """Whether `pin` could bring the mix to the device now, as far as the host goes."""
        return all(digest in self._host for digest, _ in mix)

    # Device ----------------------------------------------------------------------------------

    def pin(self, mix: Mix) -> int | None:
        """Slot of the mix, which stays until `unpin`; -1 for the base, None if not possible now.

        What is not on the device is brought there, in place of what was not used for longest.
        """
        if not mix:
            return -1
        if not self.ready(mix):
            return None
        return self._device.pin(mix, {d: self._host[d] for d, _ in mix})

    def unpin(self, mix: Mix) -> None:
        """Ends one successful `pin`. The mix stays on the device until its place is needed."""
        if mix:
            self._device.unpin(mix)
            self._drop_unneeded(digest for digest, _ in mix)

    def resident(self) -> Collection[Mix] | None:
        """The only mixes beside the base that `pin` can succeed for now; None: others may, too."""
        return self._device.resident()

    @property
    def num_copies(self) -> int:
        """How often an adapter was copied to its pages: it was not on the device."""
        return self._device.num_copies

    def active_sites(self, slots: Iterable[int]) -> frozenset[str]:
        """Sites that any of these slots adapts; at others there is nothing to do. -1 is allowed."""
        return self._device.active_sites(slots)

    def most_pages(self, slots: Iterable[int]) -> int:
        """Rank pages that the widest of these slots has at one site. -1 is allowed."""
        return self._device.most_pages(slots)

    def pool(self, site: str) -> RankPagePool:
        """The pages of a site."""
        return self._device.pools[site]

    @property
    def table(self) -> AdapterTable:
        """Which pages each slot uses."""
        return self._device.table

    def reserve(self) -> None:
        """Takes the memory of all pages of the sites in layers, and of scales if there are to be.

        It then stays in place.
        """
        for pool in self._layer_pools():
            pool.reserve()
        if self._config.has_lora_scales(self._is_gpu):
            for rows in self.table.scales.values():
                rows.reserve()
            self.table.norms.reserve()

    @contextmanager
    def stand_ins(self) -> Iterator[None]:
        """Within, every site has a page at least, though no adapter has needed it yet.

        The embedding and the head have rows, where there may be any.
        """
        with ExitStack() as stack:
            for pool in self._device.pools.values():
                stack.enter_context(pool.stand_in())
            for rows in self.table.rows.values():
                if self._config.max_lora_token_rows:
                    stack.enter_context(rows.stand_in())
            yield

    @property
    def reserved_bytes(self) -> int:
        """Bytes of all pages of the sites in layers, and of the scales that have their memory."""
        pages = sum(pool.capacity * pool.page_bytes for pool in self._layer_pools())
        norms = self.table.norms
        scales = (rows for rows in self.table.scales.values() if rows.is_allocated)
        of_slots = sum(rows.capacity_bytes for rows in scales)
        return pages + of_slots + norms.is_allocated * norms.capacity_bytes

    @property
    def needs_token_slots(self) -> bool:
        """Whether a step with adapters must know the adapter slot of each token."""
        of_tokens = self.table.norms, self.table.rows.get("embed")
        return any(rows is not None and rows.is_allocated for rows in of_tokens)

    def _layer_pools(self) -> list[RankPagePool]:
        return [pool for name, pool in self._device.pools.items() if self._sites[name].in_layers]

    @property
    def num_bytes(self) -> int:
        """Bytes of the device pages in use."""
        return sum(pool.num_bytes for pool in self._device.pools.values())

    def reset(self, held: Iterable[Mix]) -> None:
        """Holds these mixes and pins none. Idempotent, whatever was raised in the midst of a call.

        What is complete on the device stays there; what was to be dropped is.
        """
        self._holds = Counter(digest for mix in held for digest, _ in mix)
        self._device.reset()
        self._drop_unneeded(list(self._host))

    def check_integrity(
        self, pins: Iterable[Mix] | None = None, holds: Iterable[Mix] | None = None
    ) -> None:
        """Asserts that names, references, pages, slots and table agree, also with the callers'."""
        if pins is not None:
            assert Counter(mix for mix in pins if mix) == self._device.pins, "pins differ"
        if holds is not None:
            held = Counter(digest for mix in holds for digest, _ in mix)
            assert held == self._holds, "holds differ"
        assert self._host.keys() >= set(self._names.values())
        assert self._holds.keys() <= self._host.keys()
        assert min(self._holds.values(), default=1) > 0
        named = set(self._names.values())
        assert not [d for d in self._host if d not in named and not self._is_needed(d)]
        self._device.check_integrity(self._host)

    # Checks ----------------------------------------------------------------------------------

    def _is_needed(self, digest: str) -> bool:
        return digest in self._holds or self._device.is_pinned(digest)

    def _drop_unneeded(self, digests: Iterable[str]) -> None:
        digests = [d for d in digests if d in self._host and not self._is_needed(d)]
        named = set(self._names.values()) if digests else set()
        for digest in digests:
            if digest not in named and digest in self._host:
                self._device.evict(digest)
                del self._host[digest]

    def _check_size(self, name: str, adapter: Adapter) -> None:
        pages = pages_for(adapter.rank)  # at one site at least
        if adapter.rank > self._config.max_lora_rank:
            raise AdapterTooLarge(
                f"adapter {name!r} has rank {adapter.rank}, above max_lora_rank="
                f"{self._config.max_lora_rank}; restart with max_lora_rank={pages * PAGE_ROWS}"
            )
        if pages > self._capacity:
            raise AdapterTooLarge(
                f"adapter {name!r} needs {pages} rank pages at a site, but a site has "
                f"{self._capacity}; restart with lora_pages={pages} or more"
            )


def _some(names: Iterable[str]) -> str:
    known = sorted(names)
    more = f" and {len(known) - 10} more" if len(known) > 10 else ""
    return f"loaded: {', '.join(known[:10])}{more}" if known else "none is; load it first"
