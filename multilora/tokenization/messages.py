"""What a caller sends as a conversation, checked and copied into JSON's types within bounds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..arguments import read
from ..errors import RequestError

MAX_DEPTH = 64
MAX_VALUES = 50_000  # strings, numbers, lists and objects of one conversation
MAX_BITS = 1024  # of an integer
MAX_SHOWN = 80  # characters of a caller's value in an error
REASONING = ("reasoning_content", "thinking", "reasoning")  # one thing by three names

Path = tuple[Any, str | int] | str  # (path of the parent, key or index); spelled for an error


class Conversation:
    """Copies of messages, tools and template variables of one request, counted together."""

    def __init__(self, max_chars: int) -> None:
        self._chars, self._values, self._max_chars = 0, 0, max_chars

    def messages(
        self, messages: Sequence[Mapping[str, Any]], *, join_parts: bool = True
    ) -> list[dict[str, Any]]:
        """Text parts are checked and perhaps joined, arguments of tool calls checked to be JSON."""
        if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
            kind = type(messages).__name__
            raise RequestError(f"messages must be a list of messages, not {kind}")
        messages = read(list, messages, "messages")
        if not messages:
            raise RequestError("messages is empty; give at least one message")
        chat = [self._message(item, ("messages", i)) for i, item in enumerate(messages)]
        for message in chat:
            if join_parts and isinstance(message.get("content"), list):
                message["content"] = "\n".join(part["text"] for part in message["content"])
        return chat

    def tools(self, tools: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]] | None:
        """Tools as JSON objects; none for an empty list."""
        if tools is None:
            return None
        if isinstance(tools, (str, bytes, Mapping)) or not isinstance(tools, Sequence):
            raise RequestError(f"tools must be a list of objects, not {type(tools).__name__}")
        tools = read(list, tools, "tools")
        for i, tool in enumerate(tools):
            if not isinstance(tool, Mapping):
                raise RequestError(f"tools[{i}] must be an object, not {type(tool).__name__}")
        return [self.plain(tool, ("tools", i)) for i, tool in enumerate(tools)] or None

    def plain(self, value: Any, path: Path, depth: int = 0) -> Any:
        """A copy in JSON's types. A RequestError for others, and beyond the bounds."""
        self._count(value)
        if isinstance(value, str):
            return str.__str__(value)
        if value is None or type(value) in (float, bool):
            return value
        if type(value) is int:
            if value.bit_length() > MAX_BITS:
                raise RequestError(f"{_spell(path)} is an integer of more than {MAX_BITS} bits")
            return value
        if depth > MAX_DEPTH:
            raise RequestError(f"{_spell(path)} is nested more than {MAX_DEPTH} levels deep")
        if isinstance(value, Mapping):
            made = {}
            for key, item in read(dict, value, _spell(path)).items():
                if not isinstance(key, str):
                    raise RequestError(f"{_spell(path)} has a key that is not a string")
                self._count(key)
                made[str.__str__(key)] = self.plain(item, (path, key), depth + 1)
            return made
        if isinstance(value, (list, tuple)):
            return [
                self.plain(item, (path, i), depth + 1)
                for i, item in enumerate(read(list, value, _spell(path)))
            ]
        kind = type(value).__name__
        raise RequestError(f"{_spell(path)} has type {kind}; only JSON's types are supported")

    def _count(self, value: Any, values: int = 1) -> None:
        self._values += values
        if self._values > MAX_VALUES:
            raise RequestError(f"messages and tools hold more than {MAX_VALUES} values")
        self._chars += len(value) if isinstance(value, str) else 0
        if self._chars > self._max_chars:
            raise RequestError(
                f"messages and tools hold {self._chars} characters or more; "
                f"at most {self._max_chars} may be"
            )

    def _message(self, message: Mapping[str, Any], path: Path) -> dict[str, Any]:
        if not isinstance(message, Mapping):
            raise RequestError(f"{_spell(path)} must be an object, not {type(message).__name__}")
        # As transformers does: templates know that a key may be missing, not that it may be None.
        plain = {k: v for k, v in self.plain(message, path).items() if v is not None}
        if not isinstance(plain.get("role"), str):
            role = repr(plain.get("role"))[:MAX_SHOWN]
            raise RequestError(f"{_spell(path)}.role must be a string, not {role}")
        calls, content = plain.get("tool_calls"), plain.get("content")
        if calls is not None:
            plain["tool_calls"] = self._tool_calls(calls, (path, "tool_calls"))
        if isinstance(content, list):
            for i, part in enumerate(content):
                _check_part(part, ((path, "content"), i))
        elif not isinstance(content, str) and not (content is None and calls):
            raise RequestError(
                f"{_spell(path)}.content must be a string or a list of text parts, "
                f"not {type(content).__name__}"
            )
        reasoning = next((plain[name] for name in REASONING if name in plain), None)
        if reasoning is not None:
            plain = {"thinking": reasoning, **plain, "reasoning_content": reasoning}
        return plain

    def _tool_calls(self, calls: Any, path: Path) -> list[Any]:
        """Tool calls. Their arguments stay JSON text, or the objects that they are."""
        if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
            raise RequestError(f"{_spell(path)} must be a list of objects")
        for i, call in enumerate(calls):
            function = call.get("function", call)
            if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
                continue
            where = (path, i)
            function["arguments"] = text = function["arguments"] or "{}"
            self._count(None, sum(map(text.count, ",[{")))  # values at most, before there are any
            try:
                value = json.loads(text)
            except (ValueError, RecursionError) as error:
                why = str(error)[:MAX_SHOWN]
                raise RequestError(f"{_spell(where)}: arguments are not JSON: {why}") from error
            if not isinstance(value, dict):
                raise RequestError(f"{_spell(where)}: arguments are no JSON object")
            self.plain(value, (where, "arguments"))
        return calls


def _check_part(part: Any, path: Path) -> None:
    where = _spell(path)
    if not isinstance(part, dict):
        raise RequestError(f"{where} must be an object such as {{'type': 'text', 'text': ...}}")
    if part.get("type") != "text":
        kind = repr(part.get("type"))[:MAX_SHOWN]
        raise RequestError(f"{where} has type {kind}; only 'text' is supported")
    if not isinstance(part.get("text"), str):
        raise RequestError(f"{where}.text must be a string")


def _spell(path: Path) -> str:
    """`messages[0].content`, in as many characters as an error may have."""
    parts: list[str] = []
    rest: Any = path
    while isinstance(rest, tuple):
        rest, key = rest
        parts.append(f"[{key}]" if isinstance(key, int) else f".{key[:MAX_SHOWN]}")
    return f"{rest}{''.join(reversed(parts))}"[: 4 * MAX_SHOWN]
