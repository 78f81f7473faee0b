"""A request's answers as text: detokenised step by step, cut at stop strings, with logprobs."""

from __future__ import annotations

from collections.abc import Mapping

from ..adapters.mix import Mix
from ..outputs import CompletionOutput, FinishReason, RequestOutput, TokenLogprobs
from ..sampling_params import SamplingParams
from ..scheduling.scheduler_output import ChunkResult
from ..scheduling.sequence import Sequence
from ..tokenization.detokenizer import IncrementalDetokenizer
from ..tokenization.tokenizer import Tokenizer


class CompletionState:
    """One of a request's `n` answers."""

    def __init__(self, seq: Sequence, detokenizer: IncrementalDetokenizer | None) -> None:
        self.seq, self.detokenizer = seq, detokenizer
        self.text = ""
        self.logprobs: list[TokenLogprobs] = []
        self.cumulative = 0.0
        self._seen = 0  # output tokens that are in the text

    def advance(self) -> str | None:
        """Takes in the new tokens; returns the stop string that ended the answer, if one did."""
        seq = self.seq
        new, self._seen = seq.output_ids[self._seen :], len(seq.output_ids)
        if self.detokenizer is None or not new:
            return None
        before = len(self.text)
        # The token that stopped it is not part of the text.
        ended = seq.finish_reason == FinishReason.STOP
        self.text += self.detokenizer.append(new[:-1] if ended else new)
        stop = self._find_stop(before)
        if stop is None and seq.finish_reason is not None:
            self.text += self.detokenizer.finish()
            stop = self._find_stop(before)
        return stop

    def _find_stop(self, before: int) -> str | None:
        """The stop string that occurs first in the text; cuts the text there."""
        params = self.seq.params
        if not params.stop or len(self.seq.output_ids) < params.min_tokens:
            return None
        found = [
            (at, stop)
            for stop in params.stop
            if (at := self.text.find(stop, max(before - len(stop) + 1, 0))) >= 0
        ]
        if not found:
            return None
        at, stop = min(found)
        self.text = self.text[: at + len(stop) if params.include_stop_str_in_output else at]
        return stop

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
            cumulative_logprob=self.cumulative if wanted else None,
            logprobs=list(self.logprobs) if wanted else None,
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
        self.prompt_logprobs: list[TokenLogprobs | None] | None = (
            None if params.prompt_logprobs is None else [None]
        )

    def start(self, seq: Sequence, tokenizer: Tokenizer | None) -> None:
        """Adds an answer."""
        detokenizer = None
        if tokenizer is not None and self.params.detokenize:
            detokenizer = IncrementalDetokenizer(
                tokenizer, self.prompt_ids, skip_special_tokens=self.params.skip_special_tokens
            )
        self.answers.append(CompletionState(seq, detokenizer))

    def keep_logprobs(self, seq: Sequence, row: ChunkResult) -> bool:
        """Keeps what a step says of a sequence's logprobs; True if prompt logprobs came."""
        answer = self.answers[seq.index]
        if row.token is not None and row.logprobs is not None:
            answer.logprobs.append(row.logprobs)
            answer.cumulative += row.logprobs[row.token].logprob
        if self.prompt_logprobs is None or not row.prompt_logprobs or seq.index != 0:
            return False
        missing = len(self.prompt_ids) - len(self.prompt_logprobs)
        # A preempted prompt is scored again; its first positions are here already.
        first = seq.num_computed + 1
        self.prompt_logprobs += row.prompt_logprobs[len(self.prompt_logprobs) - first :][:missing]
        return True

    def advance(self, seq: Sequence) -> str | None:
        """See CompletionState.advance."""
        return self.answers[seq.index].advance()

    def output(self) -> RequestOutput:
        """Everything so far."""
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self._shown_ids,
            prompt_logprobs=None if self.prompt_logprobs is None else list(self.prompt_logprobs),
            outputs=[answer.output() for answer in self.answers],
            finished=all(answer.seq.finish_reason is not None for answer in self.answers),
            num_cached_tokens=self.answers[0].seq.num_cached,
            adapter=self.adapter if isinstance(self.adapter, str | None) else dict(self.adapter),
        )
