"""Fields: exact types, and none ignored."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from multilora.server import schemas
from multilora.server.schemas import INERT, ChatBody, CompletionBody
from tests.harness.paths import ROOT

MESSAGES = [{"role": "user", "content": "a"}]


@pytest.mark.parametrize("name", INERT)
def test_a_field_that_we_lack_may_ask_for_nothing_only(name: str) -> None:
    inert, _ = INERT[name]
    for value in inert:
        ChatBody.model_validate({"messages": MESSAGES, name: value})
    for value in ("anything", 17, {"a": 1}):
        with pytest.raises(ValidationError, match=name):
            ChatBody.model_validate({"messages": MESSAGES, name: value})


def test_the_page_names_each_of_them() -> None:
    text = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    assert not [name for name in INERT if f"`{name}`" not in text]
    bodies = (schemas.CompletionBody, schemas.ChatBody, schemas.StreamOptions)
    known = {name for body in bodies for name in body.model_fields}
    assert not [name for name in known if f"`{name}`" not in text]


@pytest.mark.parametrize(
    "change",
    [
        {"n": "1"},
        {"n": 1.5},
        {"n": True},
        {"stream": "yes"},
        {"stream": 1},
        {"temperature": "0"},
        {"stop": [1]},
        {"stop": {"a": 1}},
        {"logit_bias": [1]},
        {"prompt": None},
        {"prompt": {"a": 1}},
        {"prompt": [1, "a"]},
        {"prompt": [True]},
        {"stream_options": {"continuous_usage_stats": True}},
        {"adapter_weights": {"a": "1"}},
        {"Prompt": "a"},
    ],
)
def test_another_type_is_an_error(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        CompletionBody.model_validate({"prompt": "a", **change})


def test_null_is_what_is_not_given() -> None:
    nothing = {name: None for name in ChatBody.model_fields if name != "messages"}
    body = ChatBody.model_validate({"messages": MESSAGES, **nothing})
    assert body == ChatBody.model_validate({"messages": MESSAGES})


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": [5] * 10**6 + ["a"]},
        {"prompt": [["a"]] * 10**6},
        {"stop": [1] * 10**6},
        {"bad_words": [1] * 10**6},
        {"stop_token_ids": ["a"] * 10**6},
        {"logit_bias": {str(i): "a" for i in range(10**5)}},
        {f"field{i}": 1 for i in range(10**5)},
    ],
    ids=lambda change: min(change),
)
def test_a_body_full_of_errors_has_one(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as found:
        CompletionBody.model_validate({"prompt": "a", **change})
    assert found.value.error_count() == 1
