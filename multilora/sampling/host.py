"""Chooses tokens from logits: penalties, truncation, seeded draws and log probabilities.

A row's result depends on that row alone, to the bit. Over many rows at once only exact operations
run (argmax, comparisons); whatever rounds (softmax, penalties, division) runs on one row's own
[vocab] vector, so neither the neighbours nor their number can change it. Cumulative probabilities
are integers: their sums are exact in any order, on any device, with any number of threads.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

import multilora_kernels as mk
from multilora_kernels.reference import DRAW_BITS

from ..outputs import Logprob, TokenLogprobs
from ..sampling_params import SamplingParams

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

GREEDY_BELOW = 1e-5
"""Temperatures under this mean greedy: dividing by them would only overflow."""

_MASK64 = 2**64 - 1
_GAMMA = 0x9E3779B97F4A7C15  # splitmix64's increment, 2**64 / golden ratio


@dataclass(frozen=True, slots=True)
class SampleRow:
    """All that the choice of one row's next token depends on, next to its logits."""

    params: SamplingParams
    seed: int
    prompt_ids: list[int]
    output_ids: list[int]  # so far; their number keys the random draw together with the seed
    stop_ids: frozenset[int]  # forbidden while there are fewer than min_tokens outputs


@dataclass(frozen=True, slots=True)
class Sampled:
    """The choice for one row."""

    token: int
    logprobs: TokenLogprobs | None
    failed: bool  # logits held NaN or +inf, or no token was possible; token is then 0


_FAILED = Sampled(0, None, True)


def sample(
    logits: Tensor,  # [>= len(rows), vocab], any float dtype
    rows: Sequence[SampleRow],
) -> list[Sampled]:
    """One token for each row; rows of logits beyond `len(rows)` are ignored.

    Log probabilities are of the model's own distribution: before bias, penalties and temperature.
    Bias, allowed and stop ids must lie within the vocabulary.
    """
    if not rows:
        return []
    assert logits.shape[0] >= len(rows), f"{logits.shape[0]} rows of logits for {len(rows)} rows"
    logits = logits[: len(rows)]
    # max finds NaN first, then +inf, and -inf only where nothing is finite; and the lowest id.
    values, best = logits.max(-1, keepdim=True)
    choices: list[list[int]] = torch.cat((best, values.isfinite().to(best.dtype)), -1).tolist()
    tokens = _choose(logits, rows, [token if ok else None for token, ok in choices])
    logprobs = _logprobs(logits, rows, tokens)
    return [
        _FAILED if token is None else Sampled(token, logprobs.get(i), False)
        for i, token in enumerate(tokens)
    ]


def token_logprobs(
    logits: Tensor,  # [>= len(targets), vocab], any float dtype
    targets: Sequence[int],
    top: int,
) -> list[TokenLogprobs]:
    """For each target its log probability and rank in its row, then those of the `top` likeliest.

    Rank is 1 + the number of strictly larger logits; ties for the last place go to the lowest ids.
    A row with NaN gives its target a NaN.
    """
    assert logits.shape[0] >= len(targets), f"{logits.shape[0]} rows for {len(targets)} targets"
    chosen = torch.tensor(targets, dtype=torch.int64, device=logits.device)
    found = mk.top_logprobs(logits[: len(targets)], chosen, top)
    return [as_logprobs(*parts) for parts in zip(*found, strict=True)]


def _choose(
    logits: Tensor,  # [rows, vocab]
    rows: Sequence[SampleRow],
    best: list[int | None],  # where each row's largest logit is; None for a row that has failed
) -> list[int | None]:
    """The tokens of all rows; None where there is none to choose."""
    tokens, plain, adjusted = list(best), [], {}
    for i, row in enumerate(rows):
        greedy = row.params.temperature < GREEDY_BELOW
        if best[i] is None:
            continue
        if _adjusts(row):
            changed = _adjust(_own(logits[i]), row)
            if greedy:
                tokens[i] = _argmax(changed)
            else:
                adjusted[i] = changed
        elif not greedy:
            plain.append(i)
    if plain:
        drawn = logits if len(plain) == len(logits) else logits[plain]
        _draw(drawn, plain, rows, tokens)
    if adjusted:
        _draw(torch.stack(list(adjusted.values())), list(adjusted), rows, tokens)
    return tokens


def _logprobs(
    logits: Tensor,  # [rows, vocab]
    rows: Sequence[SampleRow],
    tokens: Sequence[int | None],
) -> dict[int, TokenLogprobs]:
    """What `rank` says of the rows that have a token and want it, by their place in `rows`."""
    wanted = {
        i: row.params.logprobs
        for i, row in enumerate(rows)
        if tokens[i] is not None and row.params.logprobs is not None
    }
    if not wanted:
        return {}
    chosen = torch.tensor([tokens[i] for i in wanted], device=logits.device)
    logits = logits if len(wanted) == len(logits) else logits[list(wanted)]
    found = zip(*mk.top_logprobs(logits, chosen, max(wanted.values())), strict=True)
    return {
        i: as_logprobs(*(part[: 1 + top] for part in parts))
        for (i, top), parts in zip(wanted.items(), found, strict=True)
    }


def _own(row: Tensor) -> Tensor:
    """An fp32 copy of a [vocab] row: ours to change, and aligned alike whatever its index was."""
    return row.to(torch.float32, copy=True)


def _adjusts(row: SampleRow) -> bool:
    """Whether anything but the temperature would change the row's logits."""
    params = row.params
    return (
        params.allowed_token_ids is not None
        or bool(params.logit_bias)
        or _must_go_on(row)
        or params.repetition_penalty != 1
        or params.presence_penalty != 0
        or params.frequency_penalty != 0
    )


def _must_go_on(row: SampleRow) -> bool:
    return bool(row.stop_ids) and len(row.output_ids) < row.params.min_tokens


def _adjust(logits: Tensor, row: SampleRow) -> Tensor:
    """The fp32 [vocab] logits, changed in place, after masks, bias and penalties."""
    params = row.params
    if params.allowed_token_ids is not None:
        allowed = _ids(params.allowed_token_ids, logits)
        logits = torch.full_like(logits, -math.inf).index_copy_(0, allowed, logits[allowed])
    if params.logit_bias:
        biased = _ids(params.logit_bias, logits)
        logits[biased] += logits.new_tensor(list(params.logit_bias.values()))
    if _must_go_on(row):
        logits[_ids(row.stop_ids, logits)] = -math.inf
    if params.repetition_penalty != 1:
        seen = _ids({*row.prompt_ids, *row.output_ids}, logits)
        old, penalty = logits[seen], params.repetition_penalty
        logits[seen] = torch.where(old > 0, old / penalty, old * penalty)
    if row.output_ids and (params.presence_penalty or params.frequency_penalty):
        counts = Counter(row.output_ids)
        used, times = _ids(counts, logits), logits.new_tensor(list(counts.values()))
        logits[used] -= params.frequency_penalty * times + params.presence_penalty
    return logits


def _ids(ids: Iterable[int], logits: Tensor) -> Tensor:
    """Token ids as an index into [vocab] logits, int64 on their device."""
    listed = list(ids)
    assert not listed or 0 <= min(listed) <= max(listed) < logits.shape[-1], "id out of vocabulary"
    return torch.tensor(listed, dtype=torch.int64, device=logits.device)


def _argmax(logits: Tensor) -> int | None:
    """The lowest id of the largest logit; None where that is not finite."""
    best = int(logits.argmax())
    return best if math.isfinite(float(logits[best])) else None


def _draw(
    logits: Tensor,  # [len(places), vocab]
    places: list[int],
    rows: Sequence[SampleRow],
    tokens: list[int | None],
) -> None:
    """Puts a random token into `tokens` at each of the places; None where none is possible."""
    columns = draw_columns([(rows[i], len(rows[i].output_ids)) for i in places], logits.shape[1])
    sent = [torch.tensor(values, dtype=kind, device=logits.device) for values, kind in columns]
    found = torch.stack(mk.draw(logits, *sent)).tolist()
    for i, token, failed in zip(places, *found, strict=True):
        tokens[i] = None if failed else token


def draw_columns(
    rows: Sequence[tuple[SampleRow, int]],  # with the number of output tokens before this one
    vocab: int,
) -> list[tuple[list[int] | list[float], torch.dtype]]:
    """What `mk.draw` takes after the logits, in its order: a value for each row, and their type."""
    params = [row.params for row, _ in rows]
    return [
        ([p.temperature for p in params], torch.float32),
        ([p.top_k if 0 < p.top_k < vocab else vocab for p in params], torch.int64),
        ([p.top_p for p in params], torch.float64),
        ([math.log(p.min_p) if p.min_p > 0 else -math.inf for p in params], torch.float64),
        ([uniform(row.seed, position) for row, position in rows], torch.int64),
    ]


def rank(
    logits: Tensor,  # [vocab], any float dtype
    target: Tensor,  # int64 [1]
    top: int,
) -> tuple[Tensor, Tensor, Tensor]:  # int64 ids, fp32 logprobs, int64 ranks, each [1 + top]
    """The target, then the `top` likeliest. Never looks at a value, so that a GPU need not wait."""
    ids, logprobs, ranks = mk.top_logprobs(logits[None], target, top)
    return ids[0], logprobs[0], ranks[0]


def as_logprobs(ids: Tensor, logprobs: Tensor, ranks: Tensor) -> TokenLogprobs:
    """What `rank` found, in its order, the target once."""
    found = zip(ids.tolist(), logprobs.tolist(), ranks.tolist(), strict=True)
    return {token: Logprob(logprob, place) for token, logprob, place in found}


def uniform(seed: int, position: int) -> int:
    """A uniform integer in [0, 2**53): output `position` of the splitmix64 stream of a seed."""
    # The seed is mixed first, so that streams of neighbouring seeds do not overlap.
    return _mix(_mix(seed + _GAMMA) + (position + 1) * _GAMMA) >> (64 - DRAW_BITS)


def _mix(value: int) -> int:
    """splitmix64's finalizer: a bijection of 64 bits that spreads every bit over all."""
    value &= _MASK64
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _MASK64
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _MASK64
    return value ^ value >> 31
