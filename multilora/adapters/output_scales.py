"""What an adapter does to a linear's output beside its low-rank delta: DoRA's scales, and biases.

DoRA gives each output column of `W + s B A` a trained length m. With the gain g = m / |W + s B A|
that is `g (W x) + (g s B) A x`: g goes into B when it is packed, and what is left is a factor for
the base's output, a row of them for each slot. A mix of adapters is the weighted sum of the changes
they make, so its factor is 1 + sum of w (g - 1). The base's own bias is not scaled: its part of the
product is taken off again in the row of biases.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from ..errors import AdapterInvalid

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor

    from multilora_kernels import Table

    from ..config.lora_sites import Site
    from .peft.reader import Adapter, LoraModule
    from .peft.trained import ModuleKey

COLUMNS = 4096  # output columns whose lengths are computed at once


class BaseWeights(Protocol):
    """The linears of the base, as they are served."""

    def columns(self, site: str, layer: int, first: int, last: int) -> Tensor:
        """Weights of these output columns of a site, fp32 [last - first, in]."""

    def bias(self, site: str, layer: int) -> Tensor | None:
        """The bias of a site, [out]; None if it has none."""


@dataclass(frozen=True, slots=True)
class PackedScales:
    """One adapter at one site: what a mix adds to the factors and biases, times its weight."""

    gain: Tensor | None  # fp32 [layers, out], g - 1
    bias: Tensor | None  # fp32 [layers, out]

    @property
    def num_bytes(self) -> int:
        """Bytes of both."""
        return sum(values.nbytes for values in (self.gain, self.bias) if values is not None)


def needs_base(adapter: Adapter) -> bool:
    """Whether what it does beside its low-rank delta depends on the base's weights."""
    magnitudes = (module.magnitude for module in adapter.modules.values())
    return bool(adapter.biases) or any(magnitude is not None for magnitude in magnitudes)


def has_scales(adapter: Adapter) -> bool:
    """Whether an adapter does anything beside its low-rank delta."""
    biases = (module.bias for module in adapter.modules.values())
    return needs_base(adapter) or any(bias is not None for bias in biases)


def dora_gains(adapter: Adapter, site: Site, base: BaseWeights) -> dict[ModuleKey, Tensor]:
    """g of each module of a site that has a magnitude, fp32 [out]. AdapterInvalid if one overflows.

    The length is that of the base as it is served, quantised or not, like PEFT's.
    """
    starts, found = site.slice_starts, {}
    for key, module in adapter.modules.items():
        if key[0] != site.name or module.magnitude is None:
            continue
        parts = []
        for first in range(0, len(module.b), COLUMNS):
            last = min(first + COLUMNS, len(module.b))
            start = starts[key[2]]
            columns = base.columns(site.name, key[1], start + first, start + last)
            parts.append(_lengths(columns, module, first, last))
        gain = module.magnitude.float() / torch.cat(parts)
        if not gain.isfinite().all():
            raise AdapterInvalid(
                f"DoRA's magnitude over the length of a column of {site.module_path(*key[1:])} "
                "is not finite: such a column of the base is zero; train without use_dora"
            )
        found[key] = gain
    return found


def _lengths(columns: Tensor, module: LoraModule, first: int, last: int) -> Tensor:
    """|W + s B A| of some output columns, fp32 on the host."""
    a, b = (t.to(columns.device, torch.float32) for t in (module.a, module.b[first:last]))
    lengths: Tensor = torch.linalg.vector_norm(columns + module.scale * (b @ a), dim=1)
    return lengths.cpu()


def pack_scales(
    adapter: Adapter, site: Site, gains: Mapping[ModuleKey, Tensor], base: BaseWeights | None
) -> PackedScales | None:
    """The rows of an adapter at a site, or None if it has none there; `gains` are `dora_gains`."""
    gain = bias = None
    if gains:
        gain = torch.zeros(site.layers, site.out)
        for key, values in gains.items():
            gain[key[1], _part(site, key)] = values - 1
    own = {key: m for key, m in adapter.modules.items() if key[0] == site.name}
    trained = {key: values for key, values in adapter.biases.items() if key[0] == site.name}
    if trained or any(module.bias is not None for module in own.values()):
        bias = torch.zeros(site.layers, site.out)
    for key, module in own.items():
        if module.bias is not None:
            assert bias is not None
            bias[key[1], _part(site, key)] += module.scale * module.bias.float()
    bias = _with_base(bias, gain, trained, site, base)
    return None if gain is None and bias is None else PackedScales(gain, bias)


def _with_base(
    bias: Tensor | None,
    gain: Tensor | None,
    trained: Mapping[ModuleKey, Tensor],
    site: Site,
    base: BaseWeights | None,
) -> Tensor | None:
    """The biases with the changes to the base's own: trained ones in their place, none scaled."""
    if base is None or (gain is None and not trained):
        return bias
    for layer in range(site.layers):
        own = base.bias(site.name, layer)
        if own is None:
            continue
        own = own.float().cpu()
        bias = torch.zeros(site.layers, site.out) if bias is None else bias
        if gain is not None:
            bias[layer] -= gain[layer] * own
        for key, values in trained.items():
            if key[1] == layer:
                part = _part(site, key)
                bias[layer, part] += values.float() - own[part]
    return bias


def _part(site: Site, key: ModuleKey) -> slice:
    """The output columns of a module among those of its site."""
    return slice(*site.slice_starts[key[2] : key[2] + 2])


class ScaleRows:
    """The factors and biases of all slots at one site. They take memory once a slot needs them."""

    def __init__(self, site: Site, slots: int, device: torch.device | str = "cpu") -> None:
        self._shape, self._device = (site.layers, slots, site.out), device
        self._rows: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def is_allocated(self) -> bool:
        """Whether a slot has ever had a row here."""
        return self._rows is not None

    @property
    def capacity_bytes(self) -> int:
        """Bytes of all rows."""
        layers, slots, out = self._shape
        return 2 * 4 * layers * slots * out

    def reserve(self) -> tuple[Tensor, Tensor, Tensor]:
        """Takes the memory of all rows, which then stays in place: row ids, factors, biases."""
        if self._rows is None:
            slots = self._shape[1]
            self._rows = (
                torch.full((slots,), -1, dtype=torch.int32, device=self._device),
                torch.ones(self._shape, device=self._device),
                torch.zeros(self._shape, device=self._device),
            )
        return self._rows

    def write(self, slot: int, parts: Iterable[tuple[PackedScales, float]]) -> None:
        """Makes the weighted sum of `parts` the row of a slot."""
        row_ids, scale, bias = self.reserve()
        for rows, start in ((scale, 1.0), (bias, 0.0)):
            rows[:, slot] = start
        for packed, weight in parts:
            if packed.gain is not None:
                scale[:, slot] += weight * packed.gain.to(scale.device)
            if packed.bias is not None:
                bias[:, slot] += weight * packed.bias.to(bias.device)
        row_ids[slot] = slot

    def clear(self, slot: int) -> None:
        """Leaves a slot without a row."""
        if self._rows is not None:
            self._rows[0][slot] = -1

    def has_row(self, slot: int) -> bool:
        """Whether a slot has a row."""
        return self._rows is not None and int(self._rows[0][slot]) == slot

    def table(self, table: Table, layer: int) -> Table:
        """A site's table with the rows of one layer."""
        if self._rows is None:
            return table
        row_ids, scale, bias = self._rows
        return table._replace(scale_row=row_ids, scale=scale[layer], bias=bias[layer])
