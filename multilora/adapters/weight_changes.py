"""What adapters change in weights that have no rank: norms, rows of the embedding, of the head.

All of it is a sum on top of the base's own weight, so that a mix is the weighted sum of the changes
that its adapters make. The device holds the sum of each slot.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from multilora_kernels import Columns

from ..errors import AdapterInvalid
from .peft.trained import TOKEN_PATHS

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from torch import Tensor

    from ..config.lora_sites import Site
    from .peft.reader import Adapter, TokenRows

GROUP = 8  # columns that `lora_columns_` computes at once


class BaseRows(Protocol):
    """The weights of the base, as they are served."""

    def token_rows(self, site: str, ids: Tensor) -> Tensor:
        """Rows of the embedding or the head by ids int64 [rows], fp32 [rows, hidden]."""

    def norm_weight(self, index: int) -> Tensor:
        """The weight of a norm, [hidden], by its place in `norm_paths`."""


@dataclass(frozen=True, slots=True)
class PackedRows:
    """One adapter at the embedding or the head: what it adds to single rows of the weight."""

    ids: Tensor  # int64 [rows], all different
    change: Tensor  # [rows, hidden]


def pack_rows(rows: TokenRows, site: str, dtype: torch.dtype, base: BaseRows) -> PackedRows:
    """What is to be added to the rows as they are served. AdapterInvalid if it overflows."""
    own = base.token_rows(site, rows.ids).to("cpu")
    change = (rows.values.float() - own).to(dtype)
    if not change.isfinite().all():
        raise AdapterInvalid(
            f"a trained row of {TOKEN_PATHS[site]} overflows {dtype}; start with "
            "lora_dtype='float32'"
        )
    return PackedRows(rows.ids, change)


def pack_norms(adapter: Adapter, count: int, base: BaseRows) -> Tensor | None:
    """What is to be added to each of the base's norms, fp32 [norms, hidden]; None = nothing."""
    changes = {
        i: own.float() - base.norm_weight(i).float().cpu() for i, own in adapter.norms.items()
    }
    if not changes:
        return None
    found = torch.zeros(count, len(next(iter(changes.values()))))
    for i, change in changes.items():
        found[i] = change
    return found


class NormChanges:
    """The changes of all slots to the norms. They take memory once a slot needs them."""

    def __init__(
        self, norms: int, slots: int, hidden: int, device: torch.device | str = "cpu"
    ) -> None:
        self._shape, self._device = (norms, slots, hidden), device
        self._rows: tuple[Tensor, Tensor] | None = None

    @property
    def is_allocated(self) -> bool:
        """Whether a slot has ever had changes."""
        return self._rows is not None

    @property
    def capacity_bytes(self) -> int:
        """Bytes of all slots."""
        norms, slots, hidden = self._shape
        return 4 * norms * slots * hidden

    def reserve(self) -> tuple[Tensor, Tensor]:
        """Takes the memory, which then stays in place: the row of each slot, the changes.

        The row after the last slot's is that of slot -1: it has none.
        """
        if self._rows is None:
            slots = self._shape[1]
            self._rows = (
                torch.full((slots + 1,), -1, dtype=torch.int32, device=self._device),
                torch.zeros(self._shape, device=self._device),
            )
        return self._rows

    def write(self, slot: int, parts: Iterable[tuple[Tensor, float]]) -> None:
        """Makes the weighted sum of `parts` the changes of a slot."""
        row, changes = self.reserve()
        changes[:, slot] = 0.0
        for change, weight in parts:
            changes[:, slot] += weight * change.to(changes.device)
        row[slot] = slot

    def clear(self, slot: int) -> None:
        """Leaves a slot without changes."""
        if self._rows is not None:
            self._rows[0][slot] = -1

    def has_row(self, slot: int) -> bool:
        """Whether a slot has changes."""
        return self._rows is not None and int(self._rows[0][slot]) == slot

    def rows_of(self, token_slots: Tensor) -> Tensor:
        """The rows of `layer` for tokens of these slots, int32 [tokens] -> int32 [tokens]."""
        assert self._rows is not None
        return self._rows[0][token_slots.long()]

    def layer(self, index: int) -> Tensor:
        """The changes to one norm, fp32 [slots, hidden]."""
        assert self._rows is not None
        return self._rows[1][index]


class RowChanges:
    """The changes of all slots to rows of the embedding or the head.

    They take memory once a slot needs them.
    """

    def __init__(
        self,
        site: Site,  # the embedding or the head
        slots: int,
        hidden: int,
        max_rows: int,  # of a slot
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        self._shape = (slots, -(-max_rows // GROUP) * GROUP, hidden)
        self._tokens = site.in_ if site.name == "embed" else 0  # the head's are not looked up
        self._dtype, self._device = dtype, device
        self._rows: tuple[Columns, Tensor] | None = None

    @property
    def is_allocated(self) -> bool:
        """Whether a slot has ever had changes."""
        return self._rows is not None

    def reserve(self) -> tuple[Columns, Tensor]:
        """Takes the memory, which then stays in place: by slot, and the row of each slot's tokens.

        The second is int32 [slots + 1, vocab] of the embedding, -1 = none; slot -1 has none.
        """
        if self._rows is None:
            slots, rows, _ = self._shape
            columns = Columns(
                torch.zeros(slots, rows, dtype=torch.int32, device=self._device),
                torch.zeros(slots, dtype=torch.int32, device=self._device),
                torch.zeros(self._shape, dtype=self._dtype, device=self._device),
            )
            row_of = columns.column_ids.new_full((slots + 1, self._tokens), -1)
            self._rows = columns, row_of
        return self._rows

    @contextmanager
    def stand_in(self) -> Iterator[None]:
        """Within, there is memory, for steps of nothing."""
        before = self._rows
        self.reserve()
        try:
            yield
        finally:
            self._rows = before

    def write(self, slot: int, parts: Iterable[tuple[PackedRows, float]]) -> None:
        """Makes the weighted sum of `parts` the changes of a slot."""
        columns, row_of = self.reserve()
        self.clear(slot)
        ids, sums = weighted_rows(parts, self._shape[2])
        count, device = len(ids), row_of.device
        columns.column_ids[slot, :count] = ids.to(device, torch.int32)
        columns.weights[slot, :count] = sums.to(device, self._dtype)
        if self._tokens:
            rows = torch.arange(count, dtype=torch.int32, device=device) + slot * self._shape[1]
            row_of[slot, ids.to(device)] = rows
        columns.num_columns[slot] = count

    def clear(self, slot: int) -> None:
        """Leaves a slot without changes."""
        if self._rows is not None:
            columns, row_of = self._rows
            columns.num_columns[slot] = 0
            row_of[slot] = -1

    def has_row(self, slot: int) -> bool:
        """Whether a slot has changes."""
        return self._rows is not None and int(self._rows[0].num_columns[slot]) > 0

    @property
    def columns(self) -> Columns:
        """What `lora_columns_` takes."""
        assert self._rows is not None
        return self._rows[0]

    def add_(self, y: Tensor, ids: Tensor, token_slots: Tensor) -> None:
        """Adds to y [tokens, hidden] what the slots of tokens change in the rows of their ids."""
        assert self._rows is not None
        columns, row_of = self._rows
        rows = row_of[token_slots.long(), ids]
        own = columns.weights.flatten(0, 1)[rows.clamp(min=0).long()]
        y.copy_(torch.where((rows >= 0)[:, None], y + own, y))


def weighted_rows(parts: Iterable[tuple[PackedRows, float]], hidden: int) -> tuple[Tensor, Tensor]:
    """The tokens whose rows any of the parts changes, rising, and the sums, fp32 [rows, hidden]."""
    parts = list(parts)
    ids = _union(packed for packed, _ in parts)
    sums = torch.zeros(len(ids), hidden)
    for packed, weight in parts:  # a part has a token once, so that the order of sums is fixed
        sums[torch.searchsorted(ids, packed.ids)] += weight * packed.change.float()
    return ids, sums


def most_rows(parts: Mapping[str, list[PackedRows]]) -> int:
    """How many rows these change together, at the site where these are most."""
    counts = (
        len(of_site[0].ids if len(of_site) == 1 else _union(of_site)) for of_site in parts.values()
    )
    return max(counts, default=0)


def _union(parts: Iterable[PackedRows]) -> Tensor:
    ids: Tensor = torch.unique(torch.cat([packed.ids for packed in parts]))
    return ids
