"""Answers of the engine in the forms of the API: completions and chats, whole or in pieces."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

from .logprobs import chat_logprobs, completion_logprobs, prompt_logprobs
from .parameters import is_scored_alone

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..outputs import CompletionOutput, RequestOutput
    from ..sampling_params import SamplingParams
    from .schemas import ChatBody, CompletionBody


class Usage:
    """Tokens of one HTTP request, over all its prompts and answers."""

    def __init__(self, num_prompts: int) -> None:
        self._prompts = [(0, 0)] * num_prompts  # tokens, and those from the prefix cache
        self._new: list[dict[int, int]] = [{} for _ in range(num_prompts)]  # tokens by answer

    def see(self, place: int, output: RequestOutput) -> None:
        """Takes an output of the prompt at `place`, cumulative or a delta."""
        self._prompts[place] = len(output.prompt_token_ids), output.num_cached_tokens
        for answer in output.outputs:
            self._new[place][answer.index] = answer.token_offset + len(answer.token_ids)

    def num_tokens(self, place: int) -> int:
        """New tokens of the answers to one prompt."""
        return sum(self._new[place].values())

    def body(self, *, is_unseen: bool = False) -> dict[str, Any]:
        """As OpenAI has it; new tokens that nobody sees do not count."""
        prompt = sum(count for count, _ in self._prompts)
        new = 0 if is_unseen else sum(map(self.num_tokens, range(len(self._new))))
        return {
            "prompt_tokens": prompt,
            "completion_tokens": new,
            "total_tokens": prompt + new,
            "prompt_tokens_details": {"cached_tokens": sum(count for _, count in self._prompts)},
        }


class AnswerForm(ABC):
    """What both have in common. An object of one request: it remembers what it has told."""

    prefix: ClassVar[str]  # of ids
    whole_object: ClassVar[str]
    chunk_object: ClassVar[str]

    def __init__(self, model: str, params: SamplingParams, *, return_token_ids: bool) -> None:
        self.id = f"{self.prefix}-{uuid.uuid4().hex}"
        self._created, self._model = int(time.time()), model
        self._params, self._with_ids = params, return_token_ids
        self.is_unseen = False  # whether what is generated is not shown

    def head(self, *, is_chunk: bool) -> dict[str, Any]:
        """The fields that stand in the whole answer, and in each chunk."""
        kind = self.chunk_object if is_chunk else self.whole_object
        return {"id": self.id, "object": kind, "created": self._created, "model": self._model}

    def whole(self, outputs: Sequence[RequestOutput], usage: Usage) -> dict[str, Any]:
        """The answer in one piece."""
        choices = [
            self.choice(place, output, answer, is_chunk=False)
            for place, output in enumerate(outputs)
            for answer in output.outputs
        ]
        return {
            **self.head(is_chunk=False),
            "choices": choices,
            "usage": usage.body(is_unseen=self.is_unseen),
        }

    def choice(
        self, place: int, output: RequestOutput, answer: CompletionOutput, *, is_chunk: bool
    ) -> dict[str, Any]:
        """One of the answers to the prompt at `place`, or what is new of it."""
        index = place * self._params.n + answer.index
        found = {
            "index": index,
            **self._content(place, output, answer, is_chunk),
            "finish_reason": answer.finish_reason,
            "stop_reason": answer.stop_reason,
        }
        if self._with_ids:
            found["token_ids"] = answer.token_ids
            if answer.token_offset == 0:
                found["prompt_token_ids"] = output.prompt_token_ids
        if not is_chunk and self._params.prompt_logprobs is not None and answer.index == 0:
            found["prompt_logprobs"] = prompt_logprobs(output.prompt_logprobs or [])
        return found

    def tells(self, answer: CompletionOutput) -> bool:
        """Whether a delta has anything to tell: text may be held back."""
        is_news = answer.text or answer.finish_reason is not None or answer.token_offset == 0
        return bool(is_news or self._with_ids or self._params.logprobs is not None)

    @abstractmethod
    def _content(
        self, place: int, output: RequestOutput, answer: CompletionOutput, is_chunk: bool
    ) -> dict[str, Any]:
        """What is not the same in both."""


class CompletionForm(AnswerForm):
    """Of `/v1/completions`."""

    prefix, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"

    def __init__(
        self,
        model: str,
        params: SamplingParams,
        body: CompletionBody,
        prompt_texts: Sequence[str],  # as they are echoed; empty where they are not
        first_tokens: Sequence[str],  # the texts of the prompts' first tokens, likewise
    ) -> None:
        super().__init__(model, params, return_token_ids=bool(body.return_token_ids))
        self._echo, self._texts, self._firsts = bool(body.echo), prompt_texts, first_tokens
        self.is_unseen = is_scored_alone(body)
        self._offsets: dict[tuple[int, int], int] = {}  # characters told, by prompt and answer
        self._prompt_logprobs: dict[int, Any] = {}

    def _content(
        self, place: int, output: RequestOutput, answer: CompletionOutput, is_chunk: bool
    ) -> dict[str, Any]:
        if output.prompt_logprobs:  # the first delta alone has them
            self._prompt_logprobs[place] = output.prompt_logprobs
        is_echoed = self._echo and answer.token_offset == 0
        text = "" if self.is_unseen else answer.text
        text = self._texts[place] + text if is_echoed else text
        found: dict[str, Any] = {"text": text, "logprobs": None}
        count = self._params.logprobs
        if count is None:
            return found
        ids = [] if self.is_unseen else list(answer.token_ids)
        places = [] if self.is_unseen else list(answer.logprobs or [])
        if is_echoed:
            ids = output.prompt_token_ids + ids
            places = [*self._prompt_logprobs[place], *places]
        start = self._offsets.get((place, answer.index), 0)
        made = completion_logprobs(ids, places, count, start)
        if is_echoed:
            made["tokens"][0] = first = self._firsts[place]
            made["text_offset"][1:] = [at + len(first) for at in made["text_offset"][1:]]
        if made["tokens"]:
            end = made["text_offset"][-1] + len(made["tokens"][-1])
            self._offsets[place, answer.index] = end
        return {**found, "logprobs": made}


class ChatForm(AnswerForm):
    """Of `/v1/chat/completions`."""

    prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, model: str, params: SamplingParams, body: ChatBody) -> None:
        super().__init__(model, params, return_token_ids=bool(body.return_token_ids))

    def _content(
        self, place: int, output: RequestOutput, answer: CompletionOutput, is_chunk: bool
    ) -> dict[str, Any]:
        message: dict[str, Any] = {"content": answer.text}
        if not is_chunk:
            message = {"role": "assistant", **message, "refusal": None}
        elif answer.token_offset == 0:
            message = {"role": "assistant", **message}
        logprobs = None
        if answer.logprobs is not None and self._params.logprobs is not None:
            logprobs = chat_logprobs(answer.token_ids, answer.logprobs, self._params.logprobs)
        return {"delta" if is_chunk else "message": message, "logprobs": logprobs}
