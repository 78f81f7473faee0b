"""Embeddings and heads that come whole with an adapter: which of their rows are not the base's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..errors import AdapterInvalid
from .peft.reader import TokenRows
from .peft.trained import TOKEN_PATHS

ROWS = 4096  # compared at once

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from .peft.reader import Adapter


def changed_rows(
    name: str,
    adapter: Adapter,
    base: Mapping[str, Tensor],  # the base's own weights, as its checkpoint has them, by site
    most: int,
) -> dict[str, TokenRows]:
    """The rows, by site, that the adapter puts in place of the base's.

    Two rows are one where one of them may be a rounding of the other, since a base is trained on in
    one dtype and served in another. AdapterInvalid if a site has more than `most`.
    """
    found = dict(adapter.token_rows)
    for site, weight in adapter.weights.items():
        ids = _unequal(weight, base[site]).nonzero()[:, 0]
        if len(ids):
            found[site] = TokenRows(ids, weight[ids])
    for site, rows in found.items():
        if len(rows.ids) > most:
            raise AdapterInvalid(
                f"adapter {name!r} changes {len(rows.ids)} rows of {TOKEN_PATHS[site]}, above "
                f"max_lora_token_rows={most}; restart with max_lora_token_rows={len(rows.ids)} if "
                "it was trained on this base, or merge it into its own and serve that"
            )
    return found


def _unequal(saved: Tensor, own: Tensor) -> Tensor:
    """Which rows differ, bool [vocab]; some at a time, for a 70B's have 4 GB."""
    found = []
    for some, base in zip(torch.split(saved, ROWS), torch.split(own, ROWS), strict=True):
        some = some.to(base.device)
        same = (some.to(base.dtype) == base).all(1)
        if not same.all():
            same |= (base.to(some.dtype) == some).all(1)
        found.append(~same)
    return torch.cat(found)
