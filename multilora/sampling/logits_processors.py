"""What changes a request's logits before a token is sampled: masks, bias and penalties.

Both samplers use these. Each works on one row's own fp32 [vocab] logits, so that neither the
neighbours nor their number change its bits. What it remembers of the tokens so far lies on the
device and takes in each new one there: nobody has to know its value.
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from ..sampling_params import LogitsProcessorLike, SamplingParams

_NONE, _ANY = -1, -2  # in place of a token: there is none, and it may be any


class LogitsProcessor(ABC):
    """One change to the logits of one request, kept from its first token to its last."""

    def is_active(self, position: int) -> bool:
        """Whether it changes anything when `position` output tokens came before."""
        return True

    @abstractmethod
    def apply_(self, logits: Tensor) -> None:
        """Changes fp32 [vocab] logits in place."""

    def update(self, token: Tensor) -> None:
        """Takes in the token that was sampled, int64 [1]; most have nothing to remember."""
        return


def logits_processors(
    params: SamplingParams,
    prompt_ids: Sequence[int],
    output_ids: Sequence[int],  # so far
    stop_ids: Collection[int],  # forbidden while there are fewer than min_tokens outputs
    vocab: int,
    device: torch.device,
    bad_words: Collection[Sequence[int]] = (),  # as token ids
) -> list[LogitsProcessor]:
    """Those of a request, in the order in which they apply; most requests have none.

    All ids must lie within the vocabulary.
    """
    found: list[LogitsProcessor] = []
    if params.allowed_token_ids is not None:
        found.append(AllowedTokens(params.allowed_token_ids, vocab, device))
    if bad_words:
        found.append(BadWords(bad_words, output_ids, vocab, device))
    if params.logit_bias:
        found.append(LogitBias(params.logit_bias, vocab, device))
    if params.min_tokens and stop_ids:
        found.append(MinTokens(params.min_tokens, stop_ids, vocab, device))
    if params.repetition_penalty != 1:
        seen = {*prompt_ids, *output_ids}
        found.append(RepetitionPenalty(params.repetition_penalty, seen, vocab, device))
    if params.presence_penalty or params.frequency_penalty:
        presence, frequency = params.presence_penalty, params.frequency_penalty
        found.append(OutputPenalties(presence, frequency, output_ids, vocab, device))
    found += [
        CallerProcessor(own, prompt_ids, output_ids) for own in params.logits_processors or ()
    ]
    return found


class AllowedTokens(LogitsProcessor):
    """All other tokens are impossible."""

    def __init__(self, allowed: Collection[int], vocab: int, device: torch.device) -> None:
        self._forbidden = ~_flags(allowed, vocab, device)

    def apply_(self, logits: Tensor) -> None:
        """Forbids all but the allowed."""
        logits.masked_fill_(self._forbidden, -math.inf)


class BadWords(LogitsProcessor):
    """The token that would complete a forbidden run of output tokens is impossible."""

    def __init__(
        self,
        words: Collection[Sequence[int]],
        output_ids: Sequence[int],
        vocab: int,
        device: torch.device,
    ) -> None:
        before = max(len(word) for word in words) - 1
        padded = [[_ANY] * (before + 1 - len(word)) + list(word) for word in words]
        self._before = torch.tensor([word[:-1] for word in padded], device=device)
        self._last = _ids([word[-1] for word in padded], vocab, device)
        recent = [*[_NONE] * before, *output_ids][len(output_ids) :]
        self._recent = torch.tensor(recent, dtype=torch.int64, device=device)

    def apply_(self, logits: Tensor) -> None:
        """Forbids the last token of each word whose others have just been generated."""
        follows = ((self._before == self._recent) | (self._before == _ANY)).all(-1)
        most = torch.where(follows, -math.inf, math.inf)
        logits.scatter_reduce_(0, self._last, most, "amin")

    def update(self, token: Tensor) -> None:
        """The token is the last one now."""
        self._recent = torch.cat((self._recent, token))[1:]


class LogitBias(LogitsProcessor):
    """Adds a number to the logits of some tokens."""

    def __init__(self, bias: Mapping[int, float], vocab: int, device: torch.device) -> None:
        self._ids = _ids(bias, vocab, device)
        self._bias = torch.tensor(list(bias.values()), dtype=torch.float32, device=device)

    def apply_(self, logits: Tensor) -> None:
        """Adds the bias."""
        logits[self._ids] += self._bias


class MinTokens(LogitsProcessor):
    """The ids that end an answer are impossible as long as it is too short."""

    def __init__(
        self, count: int, stop_ids: Collection[int], vocab: int, device: torch.device
    ) -> None:
        self._count, self._stop_ids = count, _ids(stop_ids, vocab, device)

    def is_active(self, position: int) -> bool:
        """While there are fewer output tokens than asked for."""
        return position < self._count

    def apply_(self, logits: Tensor) -> None:
        """Forbids the ids that would end it."""
        logits[self._stop_ids] = -math.inf


class RepetitionPenalty(LogitsProcessor):
    """Divides the positive logits of tokens in prompt and output, multiplies the negative ones."""

    def __init__(
        self, penalty: float, seen: Collection[int], vocab: int, device: torch.device
    ) -> None:
        self._penalty, self._seen = penalty, _flags(seen, vocab, device)

    def apply_(self, logits: Tensor) -> None:
        """Makes what was seen less likely, or likelier with a penalty below 1."""
        changed = torch.where(logits > 0, logits / self._penalty, logits * self._penalty)
        logits.copy_(torch.where(self._seen, changed, logits))

    def update(self, token: Tensor) -> None:
        """The token was seen."""
        self._seen.index_fill_(0, token, True)


class OutputPenalties(LogitsProcessor):
    """Presence and frequency penalty: for a token of the output, and for each time it occurs."""

    def __init__(
        self,
        presence: float,
        frequency: float,
        output_ids: Sequence[int],
        vocab: int,
        device: torch.device,
    ) -> None:
        self._presence, self._frequency = presence, frequency
        counts = Counter(output_ids)
        self._counts = torch.zeros(vocab, device=device)
        times = torch.tensor(list(counts.values()), dtype=torch.float32, device=device)
        self._counts[_ids(counts, vocab, device)] = times
        self._one = torch.ones(1, device=device)

    def apply_(self, logits: Tensor) -> None:
        """Takes the penalties off the logits of the output's tokens."""
        penalty = self._frequency * self._counts + self._presence
        logits -= torch.where(self._counts > 0, penalty, 0.0)

    def update(self, token: Tensor) -> None:
        """The token occurred once more."""
        self._counts.index_add_(0, token, self._one)


class CallerProcessor(LogitsProcessor):
    """A caller's own function. It sees the tokens on the host, so there is none on a GPU."""

    def __init__(
        self, function: LogitsProcessorLike, prompt_ids: Sequence[int], output_ids: Sequence[int]
    ) -> None:
        self._function, self._output_ids = function, list(output_ids)
        wants_prompt = len(inspect.signature(function).parameters) == 3
        self._prompt = (list(prompt_ids),) if wants_prompt else ()

    def apply_(self, logits: Tensor) -> None:
        """Calls it. TypeError if it does not return logits."""
        found = self._function(*self._prompt, list(self._output_ids), logits)
        if not isinstance(found, Tensor) or found.shape != logits.shape:
            raise TypeError(f"a logits processor must return logits, {list(logits.shape)}")
        logits.copy_(found)

    def update(self, token: Tensor) -> None:
        """Notes the token."""
        self._output_ids.append(int(token))


def _ids(ids: Collection[int], vocab: int, device: torch.device) -> Tensor:
    """Token ids as an index into [vocab] logits, int64."""
    assert not ids or 0 <= min(ids) <= max(ids) < vocab, "id out of vocabulary"
    return torch.tensor(list(ids), dtype=torch.int64, device=device)


def _flags(ids: Collection[int], vocab: int, device: torch.device) -> Tensor:
    """Bool [vocab]: which tokens the ids name."""
    flags = torch.zeros(vocab, dtype=torch.bool, device=device)
    flags[_ids(ids, vocab, device)] = True
    return flags
