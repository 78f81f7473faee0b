"""What a client may send in messages and tools: bounded, and refused with the place."""

from __future__ import annotations

import json
from enum import Enum
from typing import Any

import pytest

from multilora.errors import RequestError
from multilora.tokenization.chat_template import ChatTemplate
from multilora.tokenization.messages import MAX_BITS, MAX_DEPTH, MAX_VALUES, Conversation

SOURCE = (
    "{% for m in messages %}{{ m.content }}{{ m.tool_calls|tojson if m.tool_calls }}{% endfor %}"
)
TEMPLATE = ChatTemplate({"default": SOURCE}, origin="the test", variables={})
SIZE = 1 << 20


def call(arguments: Any) -> list[dict[str, Any]]:
    function = {"name": "f", "arguments": arguments}
    return [{"role": "assistant", "content": "x", "tool_calls": [{"function": function}]}]


def nested(depth: int) -> list[Any]:
    made: list[Any] = []
    for _ in range(depth):
        made = [made]
    return made


def user(**more: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": "x", **more}]


@pytest.mark.parametrize(
    ("messages", "why"),
    [
        (call("[" * 900 + "]" * 900), r"tool_calls\[0\]: arguments are no JSON object"),
        (call('{"a":' * 900 + "1" + "}" * 900), f"nested more than {MAX_DEPTH} levels"),
        (call('{"a":' * 90_000), "arguments are not JSON|more than"),
        (call("[" * 40_000), "arguments are not JSON: maximum recursion"),
        (call("[" + "[]," * 5_000_000 + "1]"), f"at most {SIZE} may be"),
        (call('{"a":[' + "[]," * 300_000 + "1]}"), f"more than {MAX_VALUES} values"),
        (call('{"a":' + "1" * 5_000 + "}"), "arguments are not JSON: Exceeds the limit"),
        (call('{"a":' + "1" * 1_000 + "}"), f"an integer of more than {MAX_BITS} bits"),
        (user(v=nested(100_000)), r"messages\[0\]\.v\[0\]\[0\].*nested more than"),
        (user(i=10**400), r"messages\[0\]\.i is an integer of more than"),
        (user(i=-(10**5000)), r"messages\[0\]\.i is an integer of more than"),
        (user() * 200_000, f"more than {MAX_VALUES} values"),
        (user(content="x" * 2_000_000), f"at most {SIZE} may be"),
        (user(**{"k" * 2_000_000: 1}), f"at most {SIZE} may be"),
        (user(**{"k" * 400_000: [1] * 20_000 + [object()]}), r"\.k+\[20000\] has type object"),
        ([{"role": ["x"] * 20_000, "content": "x"}], r"\.role must be a string, not \['x', 'x'"),
        (user(content=[{"type": "x" * 100_000}]), r"content\[0\] has type 'x+; only 'text'"),
    ],
)
def test_what_is_too_much_is_refused_with_a_short_error(messages: Any, why: str) -> None:
    with pytest.raises(RequestError, match=why) as caught:
        TEMPLATE.render(messages)
    assert len(str(caught.value)) < 500


def test_a_cycle_is_refused() -> None:
    message: dict[str, Any] = {"role": "user", "content": "x"}
    message["self"] = message
    with pytest.raises(RequestError, match=r"messages\[0\]\.self\.self.*nested more than"):
        TEMPLATE.render([message])


def test_messages_and_tools_and_variables_are_counted_together() -> None:
    conversation = Conversation(100)
    conversation.messages(user(content="x" * 40))
    conversation.tools([{"name": "y" * 20}])
    with pytest.raises(RequestError, match="at most 100"):
        conversation.plain({"date_string": "z" * 30}, "chat_template_kwargs")


def test_as_much_as_may_be_is_rendered() -> None:
    text = "x" * (SIZE - 100)
    assert TEMPLATE.render(user(content=text)).text.startswith(text)
    values = MAX_VALUES - 100
    assert TEMPLATE.render(user(v=[1] * values)).text == "x"
    inner = json.dumps({"a": [0] * (MAX_VALUES // 2 - 100)})
    assert TEMPLATE.render(call(inner)).text.startswith("x[")
    assert TEMPLATE.render(user(i=1 << (MAX_BITS - 1), f=float("nan"))).text == "x"


def test_strings_that_are_more_than_strings_are_strings() -> None:
    class Role(str, Enum):
        USER = "user"

    conversation = Conversation(SIZE)
    (message,) = conversation.messages([{"role": Role.USER, "content": "x", Role.USER: None}])
    assert message == {"role": "user", "content": "x"}
    assert [type(text) for text in (message["role"], *message)] == [str] * 3
