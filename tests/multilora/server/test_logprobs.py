"""The two forms of log probabilities."""

from __future__ import annotations

from multilora.outputs import Logprob
from multilora.server.logprobs import chat_logprobs, completion_logprobs, prompt_logprobs

PLACE = {7: Logprob(-3.0, 9, "é"), 1: Logprob(-0.5, 1, "a"), 2: Logprob(-1.0, 2, "\ufffd")}


def test_a_completion_names_the_likeliest_and_the_chosen_token() -> None:
    found = completion_logprobs([7, 1], [PLACE, {1: PLACE[1]}], 1, 10)
    assert found == {
        "tokens": ["é", "a"],
        "token_logprobs": [-3.0, -0.5],
        "top_logprobs": [{"a": -0.5, "é": -3.0}, {"a": -0.5}],
        "text_offset": [10, 11],
    }


def test_the_first_token_of_a_prompt_has_none() -> None:
    found = completion_logprobs([5, 7], [None, PLACE], 0, 0)
    assert found["token_logprobs"] == [None, -3.0]
    assert found["top_logprobs"] == [None, {"é": -3.0}]


def test_of_two_tokens_with_one_text_the_likelier_counts() -> None:
    place = {1: Logprob(-1.0, 1, "\ufffd"), 2: Logprob(-2.0, 2, "\ufffd")}
    assert completion_logprobs([2], [place], 2, 0)["top_logprobs"] == [{"\ufffd": -1.0}]


def test_a_chat_has_bytes_where_a_token_is_whole_characters() -> None:
    (found,) = chat_logprobs([7], [PLACE], 2)["content"]
    assert (found["token"], found["bytes"]) == ("é", [0xC3, 0xA9])
    assert [(one["token"], one["bytes"]) for one in found["top_logprobs"]] == [
        ("a", [97]),
        ("\ufffd", None),
    ]


def test_a_prompts_are_by_token_id() -> None:
    found = prompt_logprobs([None, {1: PLACE[1]}])
    assert found == [None, {"1": {"logprob": -0.5, "rank": 1, "decoded_token": "a"}}]
