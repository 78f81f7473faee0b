"""Fields become parameters of the engine."""

from __future__ import annotations

from typing import Any

import pytest

from multilora import RequestOutputKind, SamplingParams
from multilora.errors import RequestError
from multilora.server.parameters import SAME, chat_params, completion_params
from multilora.server.schemas import ChatBody, CompletionBody, GenerationBody

DEFAULT = SamplingParams()


def chat(default: SamplingParams = DEFAULT, **fields: Any) -> SamplingParams:
    return chat_params(ChatBody(messages=[{"role": "user", "content": "a"}], **fields), default)


def completion(default: SamplingParams = DEFAULT, **fields: Any) -> SamplingParams:
    return completion_params(CompletionBody(prompt="a", **fields), default)


def test_every_parameter_of_the_engine_has_a_field() -> None:
    """But for those that are code, that are ours to say, or that a form has in its own way."""
    own = {"logits_processors", "detokenize", "output_kind", "max_tokens", "logprobs"}
    assert set(SAME) == set(SamplingParams.__dataclass_fields__) - own
    assert set(SAME) <= set(GenerationBody.model_fields)


def test_what_is_not_given_is_the_models_default() -> None:
    default = SamplingParams(temperature=0.6, top_p=0.9)
    assert completion(default, top_p=0.5).temperature == 0.6
    assert completion(default, top_p=0.5).top_p == 0.5
    assert chat(SamplingParams(max_tokens=99)).max_tokens == 99
    assert completion(SamplingParams(max_tokens=99)).max_tokens == 99
    assert (completion().max_tokens, chat().max_tokens) == (16, None)


def test_streams_are_told_what_is_new() -> None:
    assert completion(stream=True).output_kind is RequestOutputKind.DELTA
    assert completion().output_kind is RequestOutputKind.FINAL_ONLY


def test_logprobs_have_two_forms() -> None:
    assert chat().logprobs is None
    assert chat(logprobs=True).logprobs == 0
    assert chat(logprobs=True, top_logprobs=5).logprobs == 5
    assert completion(logprobs=4).logprobs == 4
    scored = completion(logprobs=4, echo=True, max_tokens=0)
    assert (scored.prompt_logprobs, scored.max_tokens) == (4, 1)


def test_either_name_of_the_limit_is_taken() -> None:
    assert chat(max_completion_tokens=5).max_tokens == 5
    assert chat(max_tokens=5, max_completion_tokens=5).max_tokens == 5


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"max_tokens": 5, "max_completion_tokens": 6}, "differ"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"top_logprobs": 3}, "logprobs=true"),
        ({"top_logprobs": 21, "logprobs": True}, "20"),
        ({"top_logprobs": -1, "logprobs": True}, "20"),
        ({"stream": True, "prompt_logprobs": 1}, "not streamed"),
        ({"stream_options": {"include_usage": True}}, "stream=true"),
        ({"n": 0}, "n must"),
        ({"top_p": float("nan")}, "top_p"),
    ],
)
def test_what_does_not_go_together_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        chat(**fields)


def test_nothing_is_generated_only_where_the_prompt_is_scored() -> None:
    with pytest.raises(RequestError, match="max_tokens"):
        completion(max_tokens=0)
