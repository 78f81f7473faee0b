"""A request's fields become `SamplingParams`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import RequestError
from ..sampling_params import RequestOutputKind, SamplingParams

if TYPE_CHECKING:
    from .schemas import ChatBody, CompletionBody, GenerationBody

# Fields that mean what they mean in `SamplingParams`.
SAME = (
    *("n", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty"),
    *("frequency_penalty", "logit_bias", "allowed_token_ids", "bad_words", "seed", "min_tokens"),
    *("stop", "stop_token_ids", "include_stop_str_in_output", "ignore_eos"),
    *("skip_special_tokens", "prompt_logprobs", "stream_interval"),
)
COMPLETION_TOKENS = 16  # of an answer, where nobody says; in a chat as many as fit
MAX_TOP_LOGPROBS = 20  # OpenAI's limit


def completion_params(body: CompletionBody, default: SamplingParams) -> SamplingParams:
    """Of a completion. A RequestError for what is out of range, or does not go together."""
    given = _given(body)
    if body.max_tokens is None and "max_tokens" not in given:
        given["max_tokens"] = _default_max_tokens(default, COMPLETION_TOKENS)
    if body.max_tokens is not None:
        given["max_tokens"] = body.max_tokens
    if is_scored_alone(body):
        given["max_tokens"] = 1  # which nobody sees
    if body.logprobs is not None:
        given["logprobs"] = body.logprobs
        if body.echo and body.prompt_logprobs is None:
            given["prompt_logprobs"] = body.logprobs
    return default.clone(**given)


def is_scored_alone(body: CompletionBody) -> bool:
    """Whether only the prompt is wanted, with its logprobs."""
    return bool(body.echo) and body.max_tokens == 0


def chat_params(body: ChatBody, default: SamplingParams) -> SamplingParams:
    """Of a chat."""
    given = _given(body)
    limits = {body.max_tokens, body.max_completion_tokens} - {None}
    if len(limits) > 1:
        raise RequestError("max_tokens and max_completion_tokens differ; give one of them")
    given["max_tokens"] = limits.pop() if limits else _default_max_tokens(default, None)
    if body.top_logprobs is not None and not body.logprobs:
        raise RequestError("top_logprobs needs logprobs=true")
    if body.top_logprobs is not None and not 0 <= body.top_logprobs <= MAX_TOP_LOGPROBS:
        raise RequestError(f"top_logprobs must be from 0 to {MAX_TOP_LOGPROBS}")
    if body.logprobs:
        given["logprobs"] = body.top_logprobs or 0
    return default.clone(**given)


def _given(body: GenerationBody) -> dict[str, Any]:
    if body.stream_options is not None and not body.stream:
        raise RequestError("stream_options need stream=true")
    if body.stream and body.prompt_logprobs is not None:
        raise RequestError("prompt_logprobs are not streamed; ask without stream")
    given = {name: value for name in SAME if (value := getattr(body, name)) is not None}
    kind = RequestOutputKind.DELTA if body.stream else RequestOutputKind.FINAL_ONLY
    return {**given, "output_kind": kind}


def _default_max_tokens(default: SamplingParams, otherwise: int | None) -> int | None:
    """What the model's generation_config.json says, or else the API's own."""
    own = SamplingParams().max_tokens
    return otherwise if default.max_tokens == own else default.max_tokens
