"""The sampler that takes all rows at once and never looks at the host.

The tokens stay on the device, so that the next step can be prepared before they are known. All sums
that decide are of integers, as in `host`; the two differ where a probability lies within some 1e-15
of a random number or of top_p, which is to say never in practice.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

import multilora_kernels as mk
from multilora_kernels import reference
from multilora_kernels.reference import ONE

from ..device.cpu import Device
from .logprobs import launch_logprobs
from .sampler import (
    SampleError,
    SampleHandle,
    Sampler,
    SamplingRows,
    SamplingTensors,
)

SMALL = 1024  # a top_k below this needs no order of the whole vocabulary


class DeviceSampler(Sampler):
    """Keeps the last token of each request slot on the device."""

    def __init__(self, device: Device, num_request_slots: int, vocab: int) -> None:
        self._device, self._vocab = device, vocab
        self._last_tokens = torch.zeros(num_request_slots, dtype=torch.int64, device=device.torch)

    def prepare(self, rows: SamplingRows) -> SamplingTensors:
        """Whose tokens they are, and what samples those that are not greedy."""
        small: list[int] = []
        others: list[int] = []
        for i, state in enumerate(rows.states):
            if not state.is_greedy:
                is_small = 0 < state.params.top_k < min(SMALL, self._vocab)
                (small if is_small else others).append(i)
        scored = list(rows.logprobs())
        some = 0 < len(scored) < len(rows)
        return SamplingTensors(
            request_slots=torch.from_numpy(rows.request_slots),
            small_top_k=rows.random(small, self._vocab) if small else None,
            any_top_k=rows.random(others, self._vocab) if others else None,
            logprob_rows=torch.tensor(scored) if some else None,
        )

    def token_ids(self, ids: Tensor, request_slots: Tensor) -> Tensor:
        """See Sampler."""
        sampled = self._last_tokens[request_slots.clamp(min=0)]
        return torch.where(request_slots >= 0, sampled, ids)

    def launch(
        self, logits: Tensor, rows: SamplingRows, tensors: SamplingTensors | None
    ) -> SampleHandle:
        """See Sampler."""
        assert tensors is not None
        tokens, errors = _sample(logits, rows, tensors)
        self._last_tokens.index_copy_(0, tensors.request_slots, tokens)
        rows.update(tokens)
        logprobs, wanted = None, rows.logprobs()
        if wanted:
            own = slice(None) if tensors.logprob_rows is None else tensors.logprob_rows
            tops = list(wanted.values())
            logprobs = launch_logprobs(self._device, logits[own], tokens[own], tops)
        return SampleHandle(self._device.fetch([tokens, errors]), logprobs, rows)

    def profile(self, logits: Tensor) -> None:
        """About what a step needs in which no row is greedy."""
        logits.float().sort(-1)[0].double().softmax(-1)


def _sample(
    logits: Tensor,  # [rows, vocab], any float dtype
    rows: SamplingRows,
    tensors: SamplingTensors,
) -> tuple[Tensor, Tensor]:  # int64 [rows] tokens, 0 with an error, and int64 [rows] SampleErrors
    """One token for each row."""
    values, tokens = logits.max(-1)
    errors = torch.where(values.isfinite(), SampleError.NONE, SampleError.NOT_FINITE)
    processors = rows.processors()
    groups = (tensors.small_top_k, _sample_small_top_k), (tensors.any_top_k, mk.draw)
    if not processors and all(group is None for group, _ in groups):
        return tokens.masked_fill(errors > 0, 0), errors
    logits = logits.to(torch.float32, copy=True)
    if processors:
        for i, own in processors.items():
            for processor in own:
                processor.apply_(logits[i])
        values, tokens = logits.max(-1)
        overflow = torch.where(values.isfinite(), SampleError.NONE, SampleError.OVERFLOW)
        errors = _first(errors, overflow.masked_fill(values == -math.inf, SampleError.NO_TOKEN))
    for group, sample in groups:
        if group is not None:
            found, failed = sample(logits[group.rows], *group[1:])
            tokens = tokens.index_copy(0, group.rows, found)
            overflow = torch.where(failed, SampleError.OVERFLOW, SampleError.NONE)
            errors = _first(errors, torch.zeros_like(errors).index_copy(0, group.rows, overflow))
    return tokens.masked_fill(errors > 0, 0), errors


def _first(errors: Tensor, later: Tensor) -> Tensor:
    """The errors, and those found later in rows that had none."""
    return torch.where(errors == SampleError.NONE, later, errors)


def _sample_small_top_k(
    logits: Tensor,  # fp32 [rows, vocab]
    temperature: Tensor,
    top_k: Tensor,  # below SMALL
    top_p: Tensor,
    log_min_p: Tensor,
    numbers: Tensor,
) -> tuple[Tensor, Tensor]:  # int64 [rows] tokens, bool [rows] failed
    """`mk.draw` where every top_k is small: the same tokens without sorting a vocabulary.

    The survivors are the `top` that lie above the top_k-th, and then all that equal it, of which
    there may be any number: these are counted, never listed.
    """
    logits = logits / temperature[:, None]
    values, ids = logits.topk(min(SMALL, logits.shape[-1]), dim=-1)  # in falling order
    kth = _at(values, top_k - 1)
    least = (values[:, 0].double() + log_min_p).float()
    # Under it min_p, top_k or a mask drops a token.
    floor = torch.maximum(least, kth).clamp(min=torch.finfo(torch.float32).min)
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
    limit = (top_p * total).ceil().long()
    step = weight.clamp(min=1)
    among_equal = above + (limit - above + step - 1).div(step, rounding_mode="floor") * step
    last = torch.where(limit > above, among_equal, _at(cumulative, _reach(cumulative, limit)))
    threshold = reference.scaled(last, numbers)
    equal_ids = is_equal.cumsum(-1)  # how many there are up to an id
    nth = (threshold - above).div(step, rounding_mode="floor").clamp(min=0) + 1
    found = _at(ids, _reach(cumulative, threshold + 1))
    token = torch.where(threshold < above, found, _reach(equal_ids, nth))
    return token, ~values[:, 0].isfinite()


def _reach(rising: Tensor, values: Tensor) -> Tensor:
    """Where each row of [rows, n] first reaches its value; n - 1 if it never does."""
    place = torch.searchsorted(rising, values[:, None])[:, 0]
    return place.clamp(max=rising.shape[-1] - 1)


def _at(table: Tensor, places: Tensor) -> Tensor:
    """One element of each row."""
    return table.gather(1, places[:, None])[:, 0]
