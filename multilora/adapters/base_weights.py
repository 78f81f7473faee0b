"""The weights of the base that PEFT saves beside a LoRA on them: they must be the served base's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..errors import AdapterInvalid

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from .peft.reader import Adapter


def check_base(name: str, adapter: Adapter, base: Mapping[str, Tensor]) -> None:
    """AdapterInvalid unless the base weights that the adapter brings are in `base`, by site.

    One of the two may be a rounding of the other, since a base is trained on in one dtype and
    served in another.
    """
    for site, saved in adapter.base_weights.items():
        own = base.get(site)
        same = own is not None and (
            torch.equal(saved.to(own.device, own.dtype), own)
            or torch.equal(own.to(saved.device, saved.dtype), saved)
        )
        if not same:
            raise AdapterInvalid(
                f"adapter {name!r} was trained with a changed base: its {site} weight differs from "
                "the served one; multilora serves LoRA on the base it has, not modules_to_save. "
                "Train it on this base, or merge it into its own and serve that"
            )
