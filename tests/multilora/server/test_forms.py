"""Answers in the API's forms: how tokens are counted, and what deltas tell."""

from __future__ import annotations

from dataclasses import replace

from multilora import SamplingParams
from multilora.outputs import CompletionOutput, RequestOutput
from multilora.server.forms import ChatForm, CompletionForm, Usage
from multilora.server.schemas import ChatBody, CompletionBody

ANSWER = CompletionOutput(0, "ab", [8, 9], None, None, None, None)
OUTPUT = RequestOutput("r", None, [1, 2, 3], None, [ANSWER], False, 2, None)
CHAT = ChatBody(messages=[{"role": "user", "content": "a"}])


def test_tokens_are_counted_over_prompts_and_answers() -> None:
    usage = Usage(2)
    usage.see(0, OUTPUT)
    usage.see(0, replace(OUTPUT, outputs=[replace(ANSWER, token_offset=2, token_ids=[7])]))
    usage.see(1, replace(OUTPUT, outputs=[ANSWER, replace(ANSWER, index=1)]))
    assert (usage.num_tokens(0), usage.num_tokens(1)) == (3, 4)
    assert usage.body() == {
        "prompt_tokens": 6,
        "completion_tokens": 7,
        "total_tokens": 13,
        "prompt_tokens_details": {"cached_tokens": 4},
    }
    assert usage.body(is_unseen=True)["total_tokens"] == 6


def test_a_chats_first_delta_has_the_role() -> None:
    form = ChatForm("m", SamplingParams(), CHAT)
    first = form.choice(0, OUTPUT, ANSWER, is_chunk=True)
    assert first["delta"] == {"role": "assistant", "content": "ab"}
    later = form.choice(0, OUTPUT, replace(ANSWER, token_offset=2), is_chunk=True)
    assert later["delta"] == {"content": "ab"}
    whole = form.whole([OUTPUT], Usage(1))
    assert whole["choices"][0]["message"] == {
        "role": "assistant",
        "content": "ab",
        "refusal": None,
    }
    assert whole["id"] == form.id
    assert form.head(is_chunk=True)["object"] == "chat.completion.chunk"


def test_text_that_is_held_back_makes_no_chunk() -> None:
    silent = replace(ANSWER, text="", token_offset=2)
    form = ChatForm("m", SamplingParams(), CHAT)
    assert not form.tells(silent)
    assert form.tells(replace(silent, finish_reason="stop"))
    assert ChatForm("m", SamplingParams(logprobs=1), CHAT).tells(silent)
    body = CHAT.model_copy(update={"return_token_ids": True})
    assert ChatForm("m", SamplingParams(), body).tells(silent)


def test_choices_of_several_prompts_are_numbered_through() -> None:
    form = CompletionForm("m", SamplingParams(n=3), CompletionBody(prompt=["a", "b"]), [], [])
    assert form.choice(1, OUTPUT, replace(ANSWER, index=2), is_chunk=False)["index"] == 5


def test_an_echo_stands_before_the_first_piece_alone() -> None:
    body = CompletionBody(prompt="p", echo=True)
    form = CompletionForm("m", SamplingParams(), body, ["p"], ["p"])
    assert form.choice(0, OUTPUT, ANSWER, is_chunk=True)["text"] == "pab"
    later = replace(ANSWER, token_offset=2)
    assert form.choice(0, OUTPUT, later, is_chunk=True)["text"] == "ab"
