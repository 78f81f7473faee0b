"""An adapter as it lies on the host: in page layout, made for one base, ready to be copied."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from ..config.lora_sites import num_norms
from .output_scales import BaseWeights, has_scales
from .rank_pages import PackedSite, pack
from .weight_changes import BaseRows, pack_norms

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from torch import Tensor

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
