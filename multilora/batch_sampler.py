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
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .sampler import DRAW_BITS, GREEDY_BELOW, ONE, SampleRow, uniform
from .staging import Field

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

_LOW = 27  # bits: products of halves of 53-bit numbers fit in 63


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


def draw_fields(choices: Sequence[Choice], vocab: int) -> dict[str, Field]:
    """What `choose` needs from the host for the rows that are not greedy."""
    random = [(i, c) for i, c in enumerate(choices) if c.row.params.temperature >= GREEDY_BELOW]
    count = (len(random),)
    params = [c.row.params for _, c in random]
    draws = [uniform(c.row.seed, c.position) for _, c in random]
    top_k = [p.top_k if 0 < p.top_k < vocab else vocab for p in params]
    log_min_p = [math.log(p.min_p) if p.min_p > 0 else -math.inf for p in params]
    return {
        "draw.at": Field([i for i, _ in random], torch.int64, count),
        "draw.number": Field(draws, torch.int64, count),
        "draw.top_k": Field(top_k, torch.int64, count),
        "draw.top_p": Field([p.top_p for p in params], torch.float64, count),
        "draw.log_min_p": Field(log_min_p, torch.float64, count),
        "draw.temperature": Field([p.temperature for p in params], torch.float32, count),
    }


def choose(
    logits: Tensor,  # [len(choices), vocab], any float dtype
    choices: Sequence[Choice],
    sent: Mapping[str, Tensor],  # of `draw_fields`
) -> tuple[Tensor, Tensor]:  # int64 [len(choices)] tokens, bool [len(choices)] failed
    """One token for each row; it is 0 where `failed`, for the reasons of `Sampled.failed`."""
    tokens, failed = _greedy(logits)
    adjusted = [i for i, choice in enumerate(choices) if choice.adjuster is not None]
    if adjusted or len(sent["draw.at"]):
        wide = logits.to(torch.float32, copy=True)
        for i in adjusted:
            adjuster = choices[i].adjuster
            assert adjuster is not None
            adjuster.apply_(wide[i], choices[i].position)
        if adjusted:
            tokens, impossible = _greedy(wide)
            failed = failed | impossible
        if len(sent["draw.at"]):
            at = sent["draw.at"]
            drawn, impossible = _draw(wide[at], sent)
            tokens = tokens.index_copy(0, at, drawn)
            failed = failed | torch.zeros_like(failed).index_copy(0, at, impossible)
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


def _draw(logits: Tensor, sent: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """A random token for each row of fp32 [rows, vocab] logits, and where none is possible."""
    logits = logits / sent["draw.temperature"][:, None]
    # NaN sorts first, as the largest; equal logits keep the order of their ids.
    values, ids = logits.sort(stable=True, dim=-1, descending=True)
    impossible = ~values[:, 0].isfinite()
    least = (values[:, 0].double() + sent["draw.log_min_p"]).float()
    kth = values.gather(1, sent["draw.top_k"][:, None] - 1)[:, 0]
    floor = torch.maximum(least, kth).clamp(min=torch.finfo(torch.float32).min)
    values = values.masked_fill(values < floor[:, None], -math.inf)
    weights = (values.double().softmax(-1) * ONE).long()
    cumulative = weights.cumsum(-1)
    total = cumulative[:, -1]
    # A token stays while those before it have not yet reached top_p.
    limit = (sent["draw.top_p"] * total).ceil().long()
    last = torch.searchsorted(cumulative, limit[:, None]).clamp(max=logits.shape[-1] - 1)
    threshold = _scaled(cumulative.gather(1, last)[:, 0], sent["draw.number"])
    place = torch.searchsorted(cumulative, threshold[:, None], right=True)
    return ids.gather(1, place.clamp(max=logits.shape[-1] - 1))[:, 0], impossible


def _scaled(total: Tensor, draw: Tensor) -> Tensor:
    """`total * draw >> 53` of int64 numbers below 2**53 each, exactly."""
    a1, a0 = total >> (_LOW - 1), total & (1 << (_LOW - 1)) - 1
    b1, b0 = draw >> _LOW, draw & (1 << _LOW) - 1
    # total * draw = a1 b1 2**53 + (a1 b0 + 2 a0 b1) 2**26 + a0 b0
    rest = (a1 * b0 + 2 * a0 * b1 + (a0 * b0 >> (_LOW - 1))) >> (DRAW_BITS - _LOW + 1)
    return a1 * b1 + rest
