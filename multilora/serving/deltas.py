"""Deltas that are told late: several as one, and what an aborted request had not told yet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from ..outputs import CompletionOutput, FinishReason, RequestOutput, TokenLogprobs


class Told(NamedTuple):
    """How much of an answer deltas have told."""

    tokens: int = 0
    chars: int = 0


NOTHING = Told()


@dataclass(slots=True)
class _Answer:
    """What has come of one answer."""

    first: CompletionOutput
    last: CompletionOutput
    texts: list[str]
    token_ids: list[int]
    logprobs: list[TokenLogprobs]

    def add(self, delta: CompletionOutput) -> None:
        assert delta.token_offset == self.first.token_offset + len(self.token_ids), "not the next"
        self.last = delta
        self.texts.append(delta.text)
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs or ()

    def output(self) -> CompletionOutput:
        return replace(
            self.last,
            text="".join(self.texts),
            token_ids=self.token_ids,
            logprobs=None if self.last.logprobs is None else self.logprobs,
            token_offset=self.first.token_offset,
        )


class MergedDeltas:
    """Deltas of one request as one delta. Adding costs as much as the delta tells."""

    def __init__(self, first: RequestOutput) -> None:
        self._first = self._last = first
        self._answers: dict[int, _Answer] = {}
        self._take(first)

    def add(self, delta: RequestOutput) -> None:
        """The next one."""
        self._last = delta
        self._take(delta)

    def _take(self, delta: RequestOutput) -> None:
        for answer in delta.outputs:
            known = self._answers.get(answer.index)
            if known is None:
                texts, ids = [answer.text], list(answer.token_ids)
                logprobs = list(answer.logprobs or ())
                self._answers[answer.index] = _Answer(answer, answer, texts, ids, logprobs)
            else:
                known.add(answer)

    def output(self) -> RequestOutput:
        """All of them as one; nothing may be added any more."""
        return replace(
            self._last,
            outputs=[answer.output() for _, answer in sorted(self._answers.items())],
            prompt_logprobs=self._first.prompt_logprobs,  # the others have none
        )


def aborted(everything: RequestOutput, told: Mapping[int, Told] | None) -> RequestOutput:
    """The last output of a request that ends now; `told` is what deltas have told, by answer.

    None = outputs are cumulative, and so is this one.
    """
    outputs = []
    for answer in everything.outputs:
        if told is not None and answer.finish_reason is not None:
            continue  # it has been told
        tokens, chars = NOTHING if told is None else told.get(answer.index, NOTHING)
        outputs.append(
            replace(
                answer,
                text=answer.text[chars:],
                token_ids=answer.token_ids[tokens:],
                logprobs=None if answer.logprobs is None else answer.logprobs[tokens:],
                token_offset=tokens,
                finish_reason=answer.finish_reason or FinishReason.ABORT.value,
            )
        )
    prompt_logprobs = everything.prompt_logprobs
    return replace(
        everything,
        outputs=outputs,
        prompt_logprobs=[] if told and prompt_logprobs else prompt_logprobs,
        finished=True,
    )
