"""Shapes of what `LLM` takes."""

from __future__ import annotations

from typing import Any

import pytest

from multilora.entrypoints.prompts import as_conversations, as_prompts, for_each
from multilora.errors import RequestError

MESSAGE = {"role": "user", "content": "x"}


@pytest.mark.parametrize(
    ("given", "prompts"),
    [
        ("x", ["x"]),
        (["x", [1, 2]], ["x", [1, 2]]),
        ([1, 2], [[1, 2]]),
        ({"prompt": "x"}, [{"prompt": "x"}]),
        ([{"prompt_token_ids": [1]}, "y"], [{"prompt_token_ids": [1]}, "y"]),
        ([], []),
        (range(2**62), [range(2**62)]),  # which the engine refuses by its length
    ],
)
def test_one_prompt_or_many(given: Any, prompts: list[Any]) -> None:
    assert as_prompts(given) == prompts


@pytest.mark.parametrize("wrong", [5, None, b"x", [b"x"], ["x", 5], [None]])
def test_what_is_no_prompt(wrong: Any) -> None:
    with pytest.raises(RequestError, match="prompt"):
        as_prompts(wrong)


def test_one_conversation_or_many() -> None:
    assert as_conversations([MESSAGE]) == [[MESSAGE]]
    assert as_conversations([[MESSAGE], [MESSAGE, MESSAGE]]) == [[MESSAGE], [MESSAGE, MESSAGE]]
    for wrong in ("x", 5, [MESSAGE, [MESSAGE]], [5]):
        with pytest.raises(RequestError, match="message"):
            as_conversations(wrong)


def test_one_for_all_or_one_for_each() -> None:
    assert for_each("x", 2, "name") == ["x", "x"]
    assert for_each(["x", None], 2, "name") == ["x", None]
    with pytest.raises(RequestError, match="name has 1 entries for 2 prompts"):
        for_each(["x"], 2, "name")
