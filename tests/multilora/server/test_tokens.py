"""Text to ids and back, as requests get them."""

from __future__ import annotations

from typing import Any

import pytest

from .conftest import Ask, Stepwise

MESSAGES = [{"role": "user", "content": "Hello"}]


def test_tokens_are_the_engines(ask: Ask, stepwise: Stepwise) -> None:
    tokenizer = stepwise.engine.tokenizer
    assert tokenizer is not None
    found = ask("POST", "/tokenize", json={"prompt": "Hello you", "return_token_strs": True}).json()
    assert found["tokens"] == tokenizer.encode("Hello you")
    assert (found["count"], found["max_model_len"]) == (len(found["tokens"]), 256)
    assert "".join(found["token_strs"]).endswith("Hello you")
    body: dict[str, Any] = {"prompt": "Hello you", "add_special_tokens": False}
    bare = ask("POST", "/tokenize", json=body).json()["tokens"]
    assert bare == tokenizer.encode("Hello you", add_special_tokens=False)
    assert ask("POST", "/detokenize", json={"tokens": bare}).json() == {"prompt": "Hello you"}


def test_a_chat_is_rendered(ask: Ask, stepwise: Stepwise) -> None:
    body: dict[str, Any] = {"messages": MESSAGES, "model": "feedback"}
    found = ask("POST", "/tokenize", json=body).json()
    assert found["tokens"] == stepwise.chat("Hello")
    shorter = ask("POST", "/tokenize", json={**body, "add_generation_prompt": False}).json()
    assert 0 < shorter["count"] < found["count"]


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"prompt": "a", "messages": MESSAGES},
        {"messages": MESSAGES, "add_special_tokens": True},
        {"prompt": "a", "add_generation_prompt": True},
        {"messages": MESSAGES, "chat_template_kwargs": {"messages": []}},
        {"prompt": "a", "model": 5},
    ],
)
def test_what_does_not_go_together_is_refused(ask: Ask, body: dict[str, Any]) -> None:
    assert ask("POST", "/tokenize", json=body).status_code == 400


def test_unknown_names_and_ids_are_errors(ask: Ask) -> None:
    assert ask("POST", "/tokenize", json={"prompt": "a", "model": "nobody"}).status_code == 404
    for token in (-1, 2**31, "a"):
        assert ask("POST", "/detokenize", json={"tokens": [token]}).status_code == 400
