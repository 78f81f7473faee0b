"""A request's answers as text: detokenised step by step, cut at stop strings, with logprobs.

What lasts are the tokens of its sequences, which the scheduler writes. All that is kept here is
made from them, token by token, and can be made again.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..adapters.mix import Mix
from ..outputs import CompletionOutput, FinishReason, RequestOutput
from ..sampling_params import SamplingParams
from ..scheduling.sequence import Sequence
from ..tokenization.detokenizer import IncrementalDetokenizer
from ..tokenization.tokenizer import Tokenizer


class CompletionState:
    """One of a request's `n` answers."""

    def __init__(self, seq: Sequence, tokenizer: Tokenizer | None) -> None:
        self.seq = seq
        self._tokenizer = tokenizer if seq.params.detokenize else None
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
        if self._detokenizer is None:
            return
        ended = seq.finish_reason is FinishReason.STOP and number == len(seq.output_ids) - 1
        if ended and seq.output_ids[number] in seq.stop_ids:
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

    def output(self) -> CompletionOutput:
        """The answer so far; what may yet become a stop string is held back."""
        seq, params = self.seq, self.seq.params
        text = self.text
        if seq.finish_reason is None and params.stop and not params.include_stop_str_in_output:
            text = text[: max(len(text) - max(map(len, params.stop)) + 1, 0)]
        wanted = params.logprobs is not None
        return CompletionOutput(
            index=seq.index,
            text=text,
            token_ids=list(seq.output_ids),
            cumulative_logprob=self._cumulative if wanted else None,
            logprobs=list(seq.output_logprobs) if wanted else None,
            finish_reason=None if seq.finish_reason is None else seq.finish_reason.value,
            stop_reason=seq.stop_reason,
        )


class RequestState:
    """One request: its answers and what they share."""

    def __init__(
        self,
        request_id: str,
        prompt: str | None,
        prompt_ids: list[int],
        params: SamplingParams,
        adapter: str | Mapping[str, float] | None,
        mix: Mix,
    ) -> None:
        self.request_id, self.prompt, self.prompt_ids = request_id, prompt, prompt_ids
        self.params, self.adapter, self.mix = params, adapter, mix
        self.answers: list[CompletionState] = []
        self._shown_ids = list(prompt_ids)  # the outputs' own: long, and the same in every step

    @property
    def unfinished(self) -> list[Sequence]:
        """The sequences that have not ended."""
        return [answer.seq for answer in self.answers if answer.seq.finish_reason is None]

    def output(self) -> RequestOutput:
        """Everything so far."""
        seqs = [answer.seq for answer in self.answers]
        prompt_logprobs = None
        if self.params.prompt_logprobs is not None:
            prompt_logprobs = [None, *seqs[0].prompt_logprobs]
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self._shown_ids,
            prompt_logprobs=prompt_logprobs,
            outputs=[answer.output() for answer in self.answers],
            finished=not self.unfinished,
            num_cached_tokens=seqs[0].num_cached or 0,
            adapter=self.adapter if isinstance(self.adapter, str | None) else dict(self.adapter),
            error=next((seq.error for seq in seqs if seq.error is not None), None),
        )
