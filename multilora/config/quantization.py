"""Which linears of the base are quantised when it is loaded, and how."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .engine import EngineConfig

SITES = ("qkv", "o", "gate_up", "down")


class Scheme(NamedTuple):
    """How one linear is quantised: see `multilora_kernels.quantize`."""

    bits: int
    group: int | None  # input columns that share a scale; None = all


def schemes_of(config: EngineConfig) -> Mapping[str, Scheme]:
    """The scheme of each site that is quantised.

    With int4 the head stays at int8, one scale for each token: it is also the embedding where the
    two are tied, int8 costs it nothing that can be measured, and int4 does (docs/quantization.md).
    """
    group = config.quantization_group_size
    if config.quantization is None:
        return {}
    if config.quantization == "int8":
        return dict.fromkeys((*SITES, "lm_head"), Scheme(8, group))
    return {**dict.fromkeys(SITES, Scheme(4, group or 32)), "lm_head": Scheme(8, None)}
