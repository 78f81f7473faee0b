"""A request's answers as text: detokenised step by step, cut at stop strings, with logprobs.

What lasts are the tokens of its sequences, which the scheduler writes. All that is kept here is
made from them, token by token, and can be made again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from ..adapters.activation import Activation
from ..adapters.mix import Mix
from ..outputs import (
    CompletionOutput,
    FinishReason,
    Logprob,
    RequestMetrics,
    RequestOutput,
    TokenLogprobs,
)
from ..sampling_params import RequestOutputKind, SamplingParams
from ..scheduling.sequence import Sequence
from ..tokenization.detokenizer import IncrementalDetokenizer
from ..tokenization.tokenizer import Tokenizer


class CompletionState:
    """One of a request's `n` answers."""

    def __init__(self, seq: Sequence, tokenizer: Tokenizer | None) -> None:
        self.seq = seq
        self._tokenizer = tokenizer if seq.params.detokenize else None
        self._told = self._telling = _NOTHING_TOLD
        self._restart()

    def _restart(self) -> None:
        seq = self.seq
        self._detokenizer: IncrementalDetokenizer | None = None
        if self._tokenizer is not None:
            self._detokenizer = IncrementalDetokenizer(
                self._tokenizer, seq.prompt_ids, skip_special_tokens=seq.params.skip_special_tokens
            )
        self.text = ""
        self.stop: str | None = None  # the stop string that ended it
        self._num_seen = 0  # output tokens that are in the text
        self._is_final = False  # nothing comes after what is in the text
        self._cumulative = 0.0
        self._logprobs: list[TokenLogprobs] = []  # with the text of each token
        self._is_half_made = False

    def give_up(self) -> None:
        """There will be no text: it cannot be made."""
        self._tokenizer = None
        self._restart()

    @property
    def is_behind(self) -> bool:
        """Whether there are tokens, or an end, that `advance` has not taken in."""
        seq = self.seq
        return self._num_seen < len(seq.output_ids) or (
            seq.finish_reason is not None and not self._is_final
        )

    def advance(self) -> None:
        """Takes in the new tokens. After an exception within, it begins again from the first."""
        if self._is_half_made:
            self._restart()
        self._is_half_made = True
        seq = self.seq
        for number in range(self._num_seen, len(seq.output_ids)):
            if self.stop is None:
                self._take(number)
            self._num_seen = number + 1
        if seq.finish_reason is not None and not self._is_final:
            if self._detokenizer is not None and self.stop is None:
                before = len(self.text)
                self.text += self._detokenizer.finish()
                self._find_stop(before, len(seq.output_ids))
            self._is_final = True
        self._is_half_made = False

    def _take(self, number: int) -> None:
        """Output token `number`."""
        seq = self.seq
        if seq.output_logprobs:
            token = seq.output_ids[number]
            self._cumulative += seq.output_logprobs[number][token].logprob
            self._logprobs.append(decoded(seq.output_logprobs[number], self._tokenizer))
        if self._detokenizer is None:
            return
        ended = seq.finish_reason is FinishReason.STOP and number == len(seq.output_ids) - 1
        stopped = ended and seq.output_ids[number] in seq.stop_ids
        if stopped and not seq.params.include_stop_str_in_output:
            return  # the token that stopped it is not part of the text
        before = len(self.text)
        self.text += self._detokenizer.append(seq.output_ids[number : number + 1])
        self._find_stop(before, number + 1)

    def _find_stop(self, before: int, num_tokens: int) -> None:
        """Looks for the stop string that occurs first in the text; cuts the text there."""
        params = self.seq.params
        if not params.stop or num_tokens < params.min_tokens:
            return
        found = [
            (at, stop)
            for stop in params.stop
            if (at := self.text.find(stop, max(before - len(stop) + 1, 0))) >= 0
        ]
        if found:
            at, self.stop = min(found)
            keep = len(self.stop) if params.include_stop_str_in_output else 0
            self.text = self.text[: at + keep]

    def output(self, *, is_delta: bool = False) -> CompletionOutput:
        """The answer so far, or what has come since it was told last.

        What may yet become a stop string is held back.
        """
        seq, told = self.seq, self._told if is_delta else _NOTHING_TOLD
        wanted = seq.params.logprobs is not None
        return CompletionOutput(
            index=seq.index,
            text=self.text[told.chars : self._num_chars],
            token_ids=seq.output_ids[told.tokens :],
            cumulative_logprob=self._cumulative if wanted else None,
            logprobs=self._logprobs[told.tokens :] if wanted else None,
            finish_reason=None if seq.finish_reason is None else seq.finish_reason.value,
            stop_reason=seq.stop_reason,
            token_offset=told.tokens,
        )

    @property
    def _num_chars(self) -> int:
        """Characters of the text that cannot become part of a stop string."""
        params = self.seq.params
        if (
            not params.stop
            or params.include_stop_str_in_output
            or self.seq.finish_reason is not None
        ):
            return len(self.text)
        return max(len(self.text) - max(map(len, params.stop)) + 1, 0)

    @property
    def is_told(self) -> bool:
        """Whether anything of it has reached the caller."""
        return self._told is not _NOTHING_TOLD

    def is_due(self, interval: int) -> bool:
        """Whether there is something to tell, at an interval in tokens."""
        told, count = self._told, len(self.seq.output_ids)
        if self.seq.finish_reason is not None:
            return not told.is_final
        return count - told.tokens >= (interval if told.tokens else 1)

    def tell(self) -> None:
        """What `output` gives now is on its way to the caller."""
        seq = self.seq
        self._telling = _Told(len(seq.output_ids), self._num_chars, seq.finish_reason is not None)

    def was_told(self) -> None:
        """It has reached the caller."""
        self._told = self._telling


class _Told(NamedTuple):
    """How much of an answer the caller knows."""

    tokens: int = 0
    chars: int = 0
    is_final: bool = False


_NOTHING_TOLD = _Told()


def decoded(logprobs: TokenLogprobs, tokenizer: Tokenizer | None) -> TokenLogprobs:
    """With the text of each token by itself, if there is a tokenizer."""
    if tokenizer is None:
        return logprobs
    return {
        token: Logprob(
            found.logprob, found.rank, tokenizer.decode([token], skip_special_tokens=False)
        )
        for token, found in logprobs.items()
    }


class RequestState:
    """One request: its answers and what they share."""

    def __init__(
        self,
        request_id: str,
        prompt: str | None,
        prompt_ids: list[int],
        params: SamplingParams,
        adapter: str | Mapping[str, float] | None,
        activation: Activation | None,  # None = its adapters are yet to be loaded
        arrived: tuple[float, float],  # seconds since 1970, and by the engine's clock
        bad_words: tuple[tuple[int, ...], ...] = (),  # of `params`, as token ids
        tokenizer: Tokenizer | None = None,
    ) -> None:
        self.request_id, self.prompt, self.prompt_ids = request_id, prompt, prompt_ids
        self.params, self.adapter, self.bad_words = params, adapter, bad_words
        self.activation = activation
        self._arrived = arrived
        self._ready = arrived[1] if activation is not None else 0.0
        self._scheduled = self._first = self._last = 0.0
        self._count = 0  # tokens of all answers
        # Of everything each time, so that nobody has to know what was told before.
        is_cumulative = params.output_kind is RequestOutputKind.CUMULATIVE
        self._tells_all = is_cumulative and params.stream_interval is None
        self._tokenizer = tokenizer
        self._shown_logprobs: list[TokenLogprobs | None] = [None]  # of the prompt, likewise
        self.answers: list[CompletionState] = []
        self._shown_ids = list(prompt_ids)  # the outputs' own: long, and the same in every step

    @property
    def mix(self) -> Mix:
        """What it holds of the adapters."""
        return () if self.activation is None else self.activation.mix

    @property
    def is_parked(self) -> bool:
        """Whether it waits for its adapters to be loaded; until then no scheduler knows it."""
        return self.activation is None and bool(self.unfinished)

    def activate(self, activation: Activation, now: float) -> None:
        """Its adapters are there and held. From the last line on it is no longer parked."""
        for answer in self.answers:
            answer.seq.activate(activation)
        self._ready = now
        self.activation = activation

    @property
    def unfinished(self) -> list[Sequence]:
        """The sequences that have not ended."""
        return [answer.seq for answer in self.answers if answer.seq.finish_reason is None]

    def is_due(self) -> bool:
        """Whether its caller wants to hear of it now."""
        if self._tells_all:
            return True
        if self.params.output_kind is RequestOutputKind.FINAL_ONLY:
            return not self.unfinished
        return not self.unfinished or bool(self._shown(is_delta=True))

    def _shown(self, *, is_delta: bool) -> list[CompletionState]:
        """The answers that an output has."""
        interval = self.params.stream_interval or 1
        return [a for a in self.answers if a.is_due(interval)] if is_delta else self.answers

    def tell(self) -> RequestOutput:
        """What its caller wants to hear, to be followed by `was_told` when it is there."""
        if self._tells_all:
            return self.output()
        is_delta = self.params.output_kind is RequestOutputKind.DELTA
        for answer in self._shown(is_delta=is_delta):
            answer.tell()
        return self.output(is_delta=is_delta)

    def was_told(self) -> None:
        """The last output has reached the caller."""
        if not self._tells_all:
            for answer in self.answers:
                answer.was_told()

    def mark_scheduled(self, now: float) -> None:
        """Notes the time of its first step."""
        self._scheduled = self._scheduled or now

    def mark_token(self, now: float) -> None:
        """Notes the time of its newest token, if there is a new one."""
        count = 0
        for answer in self.answers:
            count += len(answer.seq.output_ids)
        if count > self._count:
            self._first, self._last, self._count = self._first or now, now, count

    @property
    def metrics(self) -> RequestMetrics:
        """When what happened to it."""
        arrival, queued = self._arrived
        return RequestMetrics(
            arrival, queued, self._scheduled, self._first, self._last, self._count, self._ready
        )

    def output(self, *, is_delta: bool = False) -> RequestOutput:
        """Everything so far; of its answers with `is_delta` what is new, of those that have it."""
        error, finished = None, True
        prompt_logprobs = self._prompt_logprobs()
        for answer in self.answers:
            finished = finished and answer.seq.finish_reason is not None
            error = error or answer.seq.error
            if is_delta and prompt_logprobs and answer.is_told:
                prompt_logprobs = []  # the first output had them
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self._shown_ids,
            prompt_logprobs=prompt_logprobs,
            outputs=[a.output(is_delta=is_delta) for a in self._shown(is_delta=is_delta)],
            finished=finished,
            num_cached_tokens=self.answers[0].seq.num_cached or 0,
            adapter=self.adapter if isinstance(self.adapter, str | None) else dict(self.adapter),
            adapter_start=None if self.activation is None else self.activation.start,
            error=error,
            metrics=self.metrics,
        )

    def _prompt_logprobs(self) -> list[TokenLogprobs | None] | None:
        if self.params.prompt_logprobs is None:
            return None
        known = self.answers[0].seq.prompt_logprobs
        tokenizer = self._tokenizer if self.params.detokenize else None
        new = [decoded(one, tokenizer) for one in known[len(self._shown_logprobs) - 1 :]]
        if new:  # a list of its own: the outputs before keep theirs
            self._shown_logprobs = [*self._shown_logprobs, *new]
        return self._shown_logprobs
