"""Chooses tokens for many rows at once without a look at the host: the rule of `sampler`, batched.

The tokens stay on the device, so that the next step can be prepared before they are known. Random
numbers come from the host: they depend on the request's seed and the position only. All sums that
decide are of integers, as in `sampler`; the two differ where a probability lies within some 1e-15
of a draw or of top_p, which is to say never in practice.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from multilora_kernels import reference
from multilora_kernels.reference import ONE

from ..device.input_buffer import InputField
from .host import GREEDY_BELOW, SampleRow, draw_columns

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

FEW = 1024  # top_k below this needs no order of the whole vocabulary


@dataclass(frozen=True, slots=True)
class Choice:
    """One row that needs a token."""

    row: SampleRow
    adjuster: Adjuster | None
    position: int  # output tokens before this one


class Adjuster:
    """Bias, allowed ids, forbidden stop ids and penalties of one row, ready on the device."""

    def __init__(self, row: SampleRow, vocab: int, device: torch.device) -> None:
        params = row.params
        self._params, self._device = params, device
        self._allowed = self._seen = self._counts = None
        if params.allowed_token_ids is not None:
            self._allowed = self._flags(params.allowed_token_ids, vocab)
        bias = params.logit_bias or {}
        self._bias_ids, self._bias = self._ids(bias), self._floats(list(bias.values()))
        self._stop_ids = self._ids(row.stop_ids) if params.min_tokens else None
        if params.repetition_penalty != 1:
            self._seen = self._flags({*row.prompt_ids, *row.output_ids}, vocab)
        if params.presence_penalty or params.frequency_penalty:
            counts = Counter(row.output_ids)
            self._counts = torch.zeros(vocab, device=device)
            self._counts[self._ids(counts)] = self._floats(list(counts.values()))

    @staticmethod
    def of(row: SampleRow, vocab: int, device: torch.device) -> Adjuster | None:
        """One for the row, or None if nothing but the temperature ever changes its logits."""
        params = row.params
        needed = (
            params.allowed_token_ids is not None
            or bool(params.logit_bias)
            or params.min_tokens > 0
            or params.repetition_penalty != 1
            or params.presence_penalty != 0
            or params.frequency_penalty != 0
        )
        return Adjuster(row, vocab, device) if needed else None

    def apply_(self, logits: Tensor, position: int) -> None:
        """Changes fp32 [vocab] logits in place, in the order of `sampler`."""
        params = self._params
        if self._allowed is not None:
            logits.masked_fill_(~self._allowed, -math.inf)
        if len(self._bias_ids):
            logits[self._bias_ids] += self._bias
        if self._stop_ids is not None and position < params.min_tokens:
            logits[self._stop_ids] = -math.inf
        if self._seen is not None:
            penalty = params.repetition_penalty
            changed = torch.where(logits > 0, logits / penalty, logits * penalty)
            logits.copy_(torch.where(self._seen, changed, logits))
        if self._counts is not None:
            cost = params.frequency_penalty * self._counts + params.presence_penalty
            logits -= torch.where(self._counts > 0, cost, 0.0)

    def note(self, token: Tensor) -> None:
        """Takes in a token, int64 [1], that was sampled."""
        if self._seen is not None:
            self._seen.index_fill_(0, token, True)
        if self._counts is not None:
            self._counts.index_add_(0, token, torch.ones(1, device=self._device))

    def _ids(self, ids: Iterable[int]) -> Tensor:
        return torch.tensor(list(ids), dtype=torch.int64, device=self._device)

    def _floats(self, values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=self._device)

    def _flags(self, ids: Iterable[int], vocab: int) -> Tensor:
        flags = torch.zeros(vocab, dtype=torch.bool, device=self._device)
        flags[self._ids(ids)] = True
        return flags


def draw_fields(choices: Sequence[Choice], vocab: int) -> dict[str, InputField]:
    """What `choose` needs from the host for the rows that are not greedy.

    Those with a small top_k are apart ("few"): they need no order of the whole vocabulary.
    """
    random = [(i, c) for i, c in enumerate(choices) if c.row.params.temperature >= GREEDY_BELOW]
    few = [(i, c) for i, c in random if 0 < c.row.params.top_k < min(FEW, vocab)]
    many = [(i, c) for i, c in random if not 0 < c.row.params.top_k < min(FEW, vocab)]
    return _group_fields("few", few, vocab) | _group_fields("many", many, vocab)


def _group_fields(name: str, rows: list[tuple[int, Choice]], vocab: int) -> dict[str, InputField]:
    columns = draw_columns([(c.row, c.position) for _, c in rows], vocab)
    columns.insert(0, ([i for i, _ in rows], torch.int64))
    return {
        f"{name}.{field}": InputField(values, kind, (len(rows),))
        for field, (values, kind) in zip(_Group._fields, columns, strict=True)
    }


def choose(
    logits: Tensor,  # [len(choices), vocab], any float dtype
    choices: Sequence[Choice],
    sent: Mapping[str, Tensor],  # of `draw_fields`
) -> tuple[Tensor, Tensor]:  # int64 [len(choices)] tokens, bool [len(choices)] failed
    """One token for each row; it is 0 where `failed`, for the reasons of `Sampled.failed`."""
    tokens, failed = _greedy(logits)
    adjusted = [i for i, choice in enumerate(choices) if choice.adjuster is not None]
    if adjusted or len(sent["few.at"]) or len(sent["many.at"]):
        wide = logits.to(torch.float32, copy=True)
        for i in adjusted:
            adjuster = choices[i].adjuster
            assert adjuster is not None
            adjuster.apply_(wide[i], choices[i].position)
        if adjusted:
            tokens, impossible = _greedy(wide)
            failed = failed | impossible
        for name, draw in (("few", _draw_few), ("many", _draw_many)):
            group = _Group(*(sent[f"{name}.{field}"] for field in _Group._fields))
            if len(group.at):
                drawn, impossible = draw(wide[group.at], group)
                tokens = tokens.index_copy(0, group.at, drawn)
                failed = failed | torch.zeros_like(failed).index_copy(0, group.at, impossible)
    tokens = tokens.masked_fill(failed, 0)
    for i in adjusted:
        adjuster = choices[i].adjuster
        assert adjuster is not None
        adjuster.note(tokens[i : i + 1])
    return tokens, failed


def _greedy(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The lowest id of the largest logit of each row, and where that is not finite."""
    values, tokens = logits.max(-1)
    return tokens, ~values.isfinite()


class _Group(NamedTuple):
    """The rows that are drawn in one way, [rows] each; after their places as in `draw_columns`."""

    at: Tensor  # int64, their places among all rows
    temperature: Tensor
    top_k: Tensor  # int64, at most the vocabulary
    top_p: Tensor
    log_min_p: Tensor
    number: Tensor  # int64, random, below 2**53


def _draw_many(logits: Tensor, group: _Group) -> tuple[Tensor, Tensor]:
    """A random token for each row of fp32 [rows, vocab] logits, and where none is possible."""
    return reference.draw(logits, *group[1:])


def _draw_few(logits: Tensor, group: _Group) -> tuple[Tensor, Tensor]:
    """`_draw_many` where every top_k is below FEW: the same tokens without sorting a vocabulary.

    The survivors are the `top` that lie above the top_k-th, and then all that equal it, of which
    there may be any number: these are counted, never listed.
    """
    logits = logits / group.temperature[:, None]
    values, ids = logits.topk(min(FEW, logits.shape[-1]), dim=-1)
    floor, kth = _floor(values, group)
    # Equal ones come from topk in any order: by id, and then by value, which keeps that order.
    ids, order = ids.sort(dim=-1)
    values, order = values.gather(1, order).sort(stable=True, dim=-1, descending=True)
    ids = ids.gather(1, order)
    top = (values > kth[:, None]) & (values >= floor[:, None])
    is_equal = (logits == kth[:, None]) & (kth >= floor)[:, None]
    count = is_equal.sum(-1)
    scores = (values.double() - values[:, :1]).exp().masked_fill(~top, 0.0)
    score = (kth.double() - values[:, 0]).exp().masked_fill(count == 0, 0.0)
    sum_of_scores = scores.sum(-1) + count * score
    weights = (scores / sum_of_scores[:, None] * ONE).long()
    weight = (score / sum_of_scores * ONE).long()
    cumulative = weights.cumsum(-1)
    above = cumulative[:, -1]
    total = above + count * weight
    limit = (group.top_p * total).ceil().long()
    step = weight.clamp(min=1)
    among_equal = above + (limit - above + step - 1).div(step, rounding_mode="floor") * step
    last = torch.where(limit > above, among_equal, _at(cumulative, _first(cumulative, limit)))
    threshold = reference.scaled(last, group.number)
    equal_ids = is_equal.cumsum(-1)  # how many there are up to an id
    nth = (threshold - above).div(step, rounding_mode="floor").clamp(min=0) + 1
    found = _at(ids, _first(cumulative, threshold + 1))
    token = torch.where(threshold < above, found, _first(equal_ids, nth))
    return token, ~values[:, 0].isfinite()


def _floor(values: Tensor, group: _Group) -> tuple[Tensor, Tensor]:
    """The value under which min_p, top_k or a mask drops a token; that of the top_k-th token.

    `values` are in falling order.
    """
    least = (values[:, 0].double() + group.log_min_p).float()
    kth = _at(values, group.top_k - 1)
    return torch.maximum(least, kth).clamp(min=torch.finfo(torch.float32).min), kth


def _first(rising: Tensor, values: Tensor) -> Tensor:
    """Where each row of [rows, n] first reaches its value; n - 1 if it never does."""
    place = torch.searchsorted(rising, values[:, None])[:, 0]
    return place.clamp(max=rising.shape[-1] - 1)


def _at(table: Tensor, places: Tensor) -> Tensor:
    """One element of each row."""
    return table.gather(1, places[:, None])[:, 0]
