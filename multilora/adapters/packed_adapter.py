"""An adapter as it lies on the host: in page layout, made for one base, ready to be copied."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from multilora_kernels import PAGE_ROWS

from ..config.lora_sites import num_norms
from ..errors import AdapterTooLarge, CapacityError, RequestError
from .output_scales import BaseWeights, has_scales
from .rank_pages import PackedSite, pack
from .weight_changes import BaseRows, PackedRows, most_rows, pack_norms

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch
    from torch import Tensor

    from ..config.engine import EngineConfig
    from ..config.lora_sites import Site
    from .peft.reader import Adapter, TokenRows


class ServedBase(BaseWeights, BaseRows, Protocol):
    """The base model, as far as adapters depend on its weights."""


@dataclass(frozen=True, slots=True)
class PackedAdapter:
    """One version of an adapter on the host."""

    rank: int  # largest of any module
    sites: Mapping[str, PackedSite]  # by site; those that it does not change are absent
    invocation: tuple[int, ...] = ()  # of an activated LoRA
    norms: Tensor | None = None  # fp32 [norms, hidden], what it adds to the base's

    @property
    def num_bytes(self) -> int:
        """Bytes of all its tensors."""
        norms = 0 if self.norms is None else self.norms.nbytes
        return norms + sum(packed.num_bytes for packed in self.sites.values())


def pack_adapter(
    adapter: Adapter,
    sites: Mapping[str, Site],
    dtype: torch.dtype,  # of the rank pages
    base: ServedBase | None,
    rows: Mapping[str, TokenRows],  # that it puts in place of the base's, by site
) -> PackedAdapter:
    """The adapter in page layout. `base` is looked at for all that is not plain LoRA.

    Raises AdapterInvalid like `pack`.
    """
    packed = {
        site.name: found
        for site in sites.values()
        if (found := pack(adapter, site, dtype, base, rows.get(site.name))) is not None
    }
    norms = None
    if adapter.norms:
        assert base is not None, "without the base trained norms would be ignored"
        norms = pack_norms(adapter, num_norms(sites), base)
    return PackedAdapter(adapter.rank, packed, adapter.invocation, norms)


def needs_slot_memory(adapter: Adapter) -> bool:
    """Whether slots need memory for more than rank pages and rows of tokens."""
    return has_scales(adapter) or bool(adapter.norms)


def check_mix(adapters: Sequence[PackedAdapter], config: EngineConfig, capacity: int) -> None:
    """Raises for adapters that can never be on the device together, of `capacity` pages a site.

    RequestError, AdapterTooLarge or CapacityError.
    """
    if len(adapters) > 1 and any(adapter.invocation for adapter in adapters):
        raise RequestError("an activated LoRA cannot be in a mix; name it alone")
    pages: Counter[str] = Counter()
    rows: dict[str, list[PackedRows]] = {}
    for adapter in adapters:
        for site, packed in adapter.sites.items():
            pages[site] += packed.num_pages
            if packed.rows is not None:
                rows.setdefault(site, []).append(packed.rows)
    most, limit = most_rows(rows), config.max_lora_token_rows
    if most > limit:
        raise AdapterTooLarge(
            f"the adapters of this mix change {most} rows of one weight, above "
            f"max_lora_token_rows={limit}; mix fewer of them, or restart with "
            f"max_lora_token_rows={most}"
        )
    site, most = max(pages.items(), key=lambda item: item[1], default=("", 0))
    if most * PAGE_ROWS > config.max_lora_rank:
        raise AdapterTooLarge(
            f"the adapters of this mix have rank {most * PAGE_ROWS} together at site {site}, "
            f"above max_lora_rank={config.max_lora_rank}; mix fewer or smaller ones, "
            f"or restart with max_lora_rank={most * PAGE_ROWS}"
        )
    if most > capacity:
        raise CapacityError(
            f"the adapters of this mix need {most} rank pages at site {site}, which has "
            f"{capacity}; mix fewer ones, or restart with lora_pages={most} or more"
        )
