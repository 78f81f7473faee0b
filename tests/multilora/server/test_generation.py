"""Completions and chats by OpenAI's client over loopback: the bits of the step-wise engine."""

from __future__ import annotations

import asyncio
import json
import time
from typing import TYPE_CHECKING, Any

import pytest

from multilora import AsyncEngine, Engine
from multilora.server.run import Server
from tests.harness.streams import is_clean

from .conftest import ADAPTERS, Ask, Stepwise

if TYPE_CHECKING:
    from collections.abc import Iterator

openai = pytest.importorskip("openai")

PROMPT = "We need a developer for a shop"
MESSAGES: Any = [{"role": "user", "content": "Hello"}]
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 12}


@pytest.fixture
def client(server: Server) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as found:
        yield found


def async_client(server: Server) -> Any:
    return openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


# The oracle ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", [None, *ADAPTERS])
def test_a_completion_is_the_engines(client: Any, stepwise: Stepwise, adapter: str | None) -> None:
    fields = {"temperature": 0.8, "seed": 5, "max_tokens": 12, "logprobs": 3}
    expected = stepwise.answer(PROMPT, adapter, **fields)
    found = client.completions.create(
        model=adapter or "uma", prompt=PROMPT, extra_body={"return_token_ids": True}, **fields
    )
    choice, answer = found.choices[0], expected.outputs[0]
    assert (choice.text, choice.finish_reason) == (answer.text, answer.finish_reason)
    assert choice.token_ids == answer.token_ids
    assert choice.prompt_token_ids == expected.prompt_token_ids
    assert answer.logprobs is not None
    own = [
        place[token].logprob for place, token in zip(answer.logprobs, answer.token_ids, strict=True)
    ]
    assert choice.logprobs.token_logprobs == own  # to the bit: JSON has all digits
    assert found.usage.prompt_tokens == len(expected.prompt_token_ids)
    assert found.usage.completion_tokens == len(answer.token_ids)
    assert (found.object, found.model) == ("text_completion", adapter or "uma")


def test_sixteen_streams_over_adapters_have_the_engines_bits(
    server: Server, engine: AsyncEngine, stepwise: Stepwise
) -> None:
    """Base, adapters, `base:adapter` and a mix, chats and completions, sampled and greedy."""
    mix = {"feedback": 0.7, "proposal": 0.3}
    models: list[tuple[str, Any, Any]] = [("uma", None, None), ("gpt", mix, mix)]
    models += [(name, name, None) for name in ADAPTERS]
    models += [(f"uma:{name}", name, None) for name in ADAPTERS]

    async def read(api: Any, i: int) -> None:
        model, adapter, weights = models[i // 2]
        fields: dict[str, Any] = {"seed": i, "temperature": 0.9 * (i % 4 > 1), "n": 1 + i % 3}
        extra: dict[str, Any] = {"return_token_ids": True, "top_k": 40, "min_p": 0.01}
        extra |= {} if weights is None else {"adapter_weights": weights}
        text: dict[int, str] = {}
        ids: dict[int, list[int]] = {}
        logprobs: dict[int, list[float]] = {}
        if i % 2:
            asked = stepwise.chat(f"Hello {i}")
            stream = await api.chat.completions.create(
                model=model,
                messages=[{"role": "user", "content": f"Hello {i}"}],
                max_completion_tokens=10 + i,
                logprobs=True,
                stream=True,
                extra_body=extra,
                **fields,
            )
        else:
            asked = stepwise.engine.tokenizer.encode(f"{PROMPT} {i}")
            stream = await api.completions.create(
                model=model,
                prompt=asked,
                max_tokens=10 + i,
                logprobs=0,
                stream=True,
                extra_body=extra,
                **fields,
            )
        async for chunk in stream:
            for choice in chunk.choices:
                new = choice.delta.content if i % 2 else choice.text
                text[choice.index] = text.get(choice.index, "") + new
                ids.setdefault(choice.index, []).extend(choice.token_ids)
                told = (
                    [one.logprob for one in choice.logprobs.content]
                    if i % 2
                    else choice.logprobs.token_logprobs
                )
                logprobs.setdefault(choice.index, []).extend(told)
        found[i] = (asked, adapter, {**fields, **{"top_k": 40, "min_p": 0.01}}, text, ids, logprobs)

    async def main() -> None:
        async with async_client(server) as api:
            await asyncio.gather(*(read(api, i) for i in range(16)))

    found: dict[int, Any] = {}
    asyncio.run(main())
    for i, (asked, adapter, fields, text, ids, logprobs) in found.items():
        output = stepwise.answer(asked, adapter, max_tokens=10 + i, logprobs=0, **fields)
        for answer in output.outputs:
            assert text[answer.index] == answer.text
            assert ids[answer.index] == answer.token_ids
            own = [
                p[t].logprob for p, t in zip(answer.logprobs or (), answer.token_ids, strict=True)
            ]
            assert logprobs[answer.index] == own
    assert len(found) == 16
    asyncio.run(is_clean(engine))


def test_a_chat_is_the_engines(client: Any, stepwise: Stepwise) -> None:
    expected = stepwise.answer(stepwise.chat("Hello"), "feedback", logprobs=2, **GREEDY)
    found = client.chat.completions.create(
        model="feedback", messages=MESSAGES, logprobs=True, top_logprobs=2, **GREEDY
    )
    answer, choice = expected.outputs[0], found.choices[0]
    assert (choice.message.role, choice.message.content) == ("assistant", answer.text)
    assert choice.finish_reason == answer.finish_reason
    assert [len(one.top_logprobs) for one in choice.logprobs.content] == [2] * len(answer.token_ids)
    assert "".join(one.token for one in choice.logprobs.content).startswith(answer.text)
    assert found.object == "chat.completion"


# Shapes -------------------------------------------------------------------------------------------


def test_many_prompts_are_answered_in_their_order(client: Any, stepwise: Stepwise) -> None:
    prompts = [PROMPT, "Hello", "A game"]
    for stream in (False, True):
        found = client.completions.create(
            model="proposal", prompt=prompts, n=2, seed=1, max_tokens=6, stream=stream
        )
        text = [""] * 6
        for chunk in found if stream else [found]:
            for choice in chunk.choices:
                text[choice.index] += choice.text
        expected = [
            answer.text
            for prompt in prompts
            for answer in stepwise.answer(prompt, "proposal", n=2, seed=1, max_tokens=6).outputs
        ]
        assert text == expected


def test_usage_comes_in_a_last_chunk_when_asked_for(client: Any) -> None:
    stream = client.chat.completions.create(
        model="uma",
        messages=MESSAGES,
        stream=True,
        stream_options={"include_usage": True},
        **GREEDY,
    )
    *chunks, last = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert all(chunk.usage is None for chunk in chunks)
    assert chunks[-1].choices[0].finish_reason in ("stop", "length")
    assert (last.choices, last.usage.total_tokens) == (
        [],
        last.usage.prompt_tokens + last.usage.completion_tokens,
    )
    assert last.usage.completion_tokens > 1


def test_a_stream_ends_as_openais_do(ask: Ask) -> None:
    body = {"prompt": "Hello", "stream": True, "max_tokens": 3}
    found = ask("POST", "/v1/completions", json=body)
    assert found.headers["content-type"].startswith("text/event-stream")
    *events, last, end = found.text.split("\n\n")
    assert (last, end) == ("data: [DONE]", "")
    assert all(json.loads(event.removeprefix("data: "))["id"][:5] == "cmpl-" for event in events)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("as_ids", [False, True])
def test_echo_scores_a_prompt(client: Any, stepwise: Stepwise, as_ids: bool, stream: bool) -> None:
    """As lm-eval asks: the prompt's own log probabilities, with the text that they belong to."""
    tokenizer = stepwise.engine.tokenizer
    assert tokenizer is not None
    ids = tokenizer.encode(PROMPT)
    expected = stepwise.answer(ids, "feedback", prompt_logprobs=1, logprobs=1, **GREEDY)
    asked: Any = ids if as_ids else PROMPT
    made = client.completions.create(
        model="feedback", prompt=asked, echo=True, logprobs=1, stream=stream, n=1, **GREEDY
    )
    chunks = list(made) if stream else [made]
    parts = [chunk.choices[0].logprobs for chunk in chunks]
    logprobs = [one for part in parts for one in part.token_logprobs]
    places = [*(expected.prompt_logprobs or ()), *(expected.outputs[0].logprobs or ())]
    tokens = [*ids, *expected.outputs[0].token_ids]
    own = [
        None if place is None else place[t].logprob for place, t in zip(places, tokens, strict=True)
    ]
    assert logprobs == own
    texts = [one for part in parts for one in part.tokens]
    offsets = [one for part in parts for one in part.text_offset]
    whole = "".join(texts)
    assert all(whole[at:].startswith(text) for at, text in zip(offsets, texts, strict=True))
    assert len({*offsets}) == len(offsets)
    text = "".join(chunk.choices[0].text for chunk in chunks)
    shown = tokenizer.decode(ids, skip_special_tokens=False) if as_ids else PROMPT
    assert text == shown + expected.outputs[0].text


@pytest.mark.parametrize("stream", [False, True])
def test_echo_alone_generates_nothing_that_is_seen(client: Any, stream: bool) -> None:
    made = client.completions.create(
        model="uma", prompt=["Hello", "You"], echo=True, logprobs=0, max_tokens=0, stream=stream
    )
    choices = [choice for chunk in (made if stream else [made]) for choice in chunk.choices]
    assert sorted(choice.text for choice in choices) == ["Hello", "You"]
    assert {choice.finish_reason for choice in choices} == {"length"}
    assert stream or made.usage.completion_tokens == 0


def test_echo_of_several_answers_has_the_prompt_in_each(client: Any) -> None:
    for stream in (False, True):
        made = client.completions.create(
            model="uma", prompt="Hello", echo=True, logprobs=1, n=3, seed=2, stream=stream, **GREEDY
        )
        text = [""] * 3
        for chunk in made if stream else [made]:
            for choice in chunk.choices:
                text[choice.index] += choice.text
        assert all(one.startswith("Hello") for one in text)


def test_vllms_fields_are_the_engines(ask: Ask, stepwise: Stepwise) -> None:
    fields: dict[str, Any] = {
        "top_k": 5,
        "top_p": 0.9,
        "min_p": 0.05,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.1,
        "frequency_penalty": 0.2,
        "logit_bias": {"50": 2.0},
        "bad_words": ["the"],
        "seed": 7,
        "min_tokens": 4,
        "stop": ["zz"],
        "stop_token_ids": [77],
        "include_stop_str_in_output": True,
        "ignore_eos": True,
        "skip_special_tokens": False,
        "max_tokens": 9,
        "prompt_logprobs": 1,
    }
    body = {"prompt": PROMPT, "model": "uma", "stream_interval": 2, **fields}
    found = ask("POST", "/v1/completions", json=body).json()["choices"][0]
    expected = stepwise.answer(PROMPT, **fields)
    assert found["text"] == expected.outputs[0].text
    assert len(found["prompt_logprobs"]) == len(expected.prompt_token_ids)


# What is wrong ------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("change", "status", "words"),
    [
        ({"model": "nobody"}, 404, "nobody"),
        ({"model": "uma:nobody"}, 404, "nobody"),
        ({"adapter_weights": {"nobody": 1.0}}, 404, "nobody"),
        ({"model": "feedback", "adapter_weights": {"proposal": 1.0}}, 400, "adapter_weights"),
        ({"temperature": 1000}, 400, "temperature"),
        ({"n": 10**9}, 400, "n must"),
        ({"prompt": "x " * 5000}, 400, "max_model_len"),
        ({"prompt": []}, 400, "prompt"),
        ({"prompt": [2**40]}, 400, "prompt"),
        ({"prompt": ["Hello"] * 200}, 400, "128"),
        ({"prompt": ["Hello", [3.5]]}, 400, "prompt"),
        ({"best_of": 4}, 400, "best_of"),
        ({"no_such_field": 1}, 400, "no_such_field"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format"),
    ],
)
def test_a_wrong_request_is_an_error_with_its_name(
    ask: Ask, change: dict[str, Any], status: int, words: str, stream: bool
) -> None:
    body = {"model": "uma", "prompt": "Hello", "max_tokens": 2, "stream": stream, **change}
    found = ask("POST", "/v1/completions", json=body)
    assert found.status_code == status
    error = found.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert words in error["message"]
    assert len(error["message"]) < 400


def test_a_version_of_an_adapter_can_be_asked_for(ask: Ask, engine: AsyncEngine) -> None:
    digest = asyncio.run(engine.list_adapters())["feedback"].digest
    for version, status in ((digest[:10], 200), ("0" * 10, 404)):
        body = {"model": f"feedback@{version}", "prompt": "Hello", "max_tokens": 2}
        assert ask("POST", "/v1/completions", json=body).status_code == status


def test_openais_client_raises_its_own_errors(client: Any) -> None:
    with pytest.raises(openai.NotFoundError, match="nobody"):
        client.completions.create(model="nobody", prompt="Hello")
    with pytest.raises(openai.BadRequestError, match="tools"):
        client.chat.completions.create(
            model="uma", messages=MESSAGES, tools=[{"type": "function", "function": {"name": "f"}}]
        )
    with pytest.raises(openai.BadRequestError, match="top_logprobs"):
        client.chat.completions.create(model="uma", messages=MESSAGES, top_logprobs=2)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_ends_its_request(
    server: Server, engine: AsyncEngine, stream: bool
) -> None:
    async def main() -> None:
        slow = await engine.call(_slowed)
        try:
            async with async_client(server) as api:
                task = asyncio.ensure_future(_read_one(api, stream))
                await asyncio.sleep(0.2)
                assert engine.num_requests == 1
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                begin = time.monotonic()
                while engine.num_requests and time.monotonic() - begin < 5:
                    await asyncio.sleep(0.01)
                assert engine.num_requests == 0
        finally:
            await engine.call(lambda own: setattr(own, "step", slow))
        await is_clean(engine)

    asyncio.run(main())


async def _read_one(api: Any, stream: bool) -> None:
    found = await api.completions.create(
        model="uma", prompt="Hello", max_tokens=200, stream=stream, extra_body={"ignore_eos": True}
    )
    async for _ in found:
        pass


def _slowed(own: Engine) -> Any:
    """Has each step take 50 ms more; the step that there was."""
    step = own.step

    def slowly() -> Any:
        time.sleep(0.05)
        return step()

    own.step = slowly  # type: ignore[method-assign]
    return step
