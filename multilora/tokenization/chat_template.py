"""Messages become the text of a prompt through the model folder's Jinja template.

The template comes with the base model; requests never bring one. It still runs in Jinja's immutable
sandbox, and since the sandbox does not bound time or memory, under a clock and size limits that
`template_sandbox` adds. Its words for the caller (`raise_exception`) are a RequestError;
everything else that goes wrong inside is a TokenizerError.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import RequestError, TokenizerError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from .vocabulary import Specials

TIME_LIMIT = 2.0  # seconds of processor time for one rendering
MAX_CHARS = 1 << 21  # of the rendered text, and of any string on the way; messages: half of it
SENTINELS = tuple(map(chr, range(0xFDD0, 0xFDF0)))  # code points that Unicode keeps out of text

LLAMA3_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}
{{- (message.content or '') | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""


class ChatTemplate:
    """The chat templates of one model folder, by name, compiled when first used."""

    def __init__(
        self,
        sources: Mapping[str, str],  # name -> Jinja source; "default" must be there
        *,
        origin: str,  # named in errors
        variables: Mapping[str, str],  # special tokens that templates name, e.g. bos_token
        time_limit: float = TIME_LIMIT,
        max_chars: int = MAX_CHARS,
    ) -> None:
        if "default" not in sources:
            names = ", ".join(sorted(sources)) or "none"
            raise TokenizerError(f"{origin}: no chat template is named 'default' (found: {names})")
        self.origin = origin
        self._sources = dict(sources)
        self._variables = dict(variables)
        self._limits = (time_limit, max_chars)
        self._renderers: dict[str, Callable[..., str]] = {}

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """The prompt text, where special tokens of the messages look like the template's own."""
        plain = _plain_messages(messages), _plain_tools(tools)
        return self._run(*plain, add_generation_prompt=add_generation_prompt)

    def render_shielded(
        self,
        messages: Sequence[Mapping[str, Any]],
        specials: Specials,
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> tuple[str, str]:
        """The prompt text and a sentinel: the character that breaks the callers' special tokens.

        Every special token that is whole in the text was written by the template.
        """
        plain = _plain_messages(messages), _plain_tools(tools)
        sentinel = _unused_sentinel(plain)
        broken = [_map_strings(part, lambda s: specials.break_in(s, sentinel)) for part in plain]
        return self._run(*broken, add_generation_prompt=add_generation_prompt), sentinel

    def _run(self, messages: Any, tools: Any, *, add_generation_prompt: bool) -> str:
        name = "tool_use" if tools and "tool_use" in self._sources else "default"
        if tools and not re.search(r"\btools\b", self._sources[name]):
            raise RequestError(f"the chat template of {self.origin} has no place for tools")
        size, limit = sum(map(len, _strings((messages, tools)))), self._limits[1] // 2
        if size > limit:
            raise RequestError(f"messages and tools hold {size} characters; at most {limit} may be")
        return self._renderer(name)(
            **self._variables,
            messages=messages,
            tools=tools,
            documents=None,
            add_generation_prompt=add_generation_prompt,
        )

    def _renderer(self, name: str) -> Callable[..., str]:
        if name not in self._renderers:
            from .template_sandbox import compile_template

            limit, max_chars = self._limits
            self._renderers[name] = compile_template(
                self._sources[name], origin=self.origin, time_limit=limit, max_chars=max_chars
            )
        return self._renderers[name]


def find_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """The chat templates of a folder by name: `chat_template.jinja`, else tokenizer_config.json's.

    Empty when it has none. Raises TokenizerError for a field or file of the wrong kind.
    """
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return {"default": path.read_text(encoding="utf-8")}
        except (OSError, ValueError) as error:
            raise TokenizerError(f"{path} cannot be read: {error}") from error
    found = config.get("chat_template")
    if found is None:
        return {}
    if isinstance(found, str):
        return {"default": found}
    try:
        named = {entry["name"]: entry["template"] for entry in found}
    except (TypeError, KeyError):
        named = {0: 0}
    if not all(isinstance(text, str) for pair in named.items() for text in pair):
        raise TokenizerError(
            f"{folder / 'tokenizer_config.json'}: chat_template must be a string or a list of "
            '{"name": ..., "template": ...}'
        )
    return named


def _plain_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Checked copies of the messages in JSON's types only: text parts joined, arguments parsed."""
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise RequestError(f"messages must be a list of messages, not {type(messages).__name__}")
    if not messages:
        raise RequestError("messages is empty; give at least one message")
    return [_plain_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _plain_message(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise RequestError(f"{where} must be an object, not {type(message).__name__}")
    plain = _plain(message, where)
    assert isinstance(plain, dict)
    if not isinstance(plain.get("role"), str):
        raise RequestError(f"{where}.role must be a string, not {plain.get('role')!r}")
    calls = plain.get("tool_calls")
    if calls is not None:
        plain["tool_calls"] = _plain_tool_calls(calls, f"{where}.tool_calls")
    content = plain.get("content")
    if isinstance(content, list):
        plain["content"] = "\n".join(
            _text_of(part, f"{where}.content[{i}]") for i, part in enumerate(content)
        )
    elif not isinstance(content, str) and not (content is None and calls):
        raise RequestError(
            f"{where}.content must be a string or a list of text parts, "
            f"not {type(content).__name__}"
        )
    return plain


def _text_of(part: Any, where: str) -> str:
    if not isinstance(part, dict):
        raise RequestError(f"{where} must be an object such as {{'type': 'text', 'text': ...}}")
    if part.get("type") != "text":
        raise RequestError(f"{where} has type {part.get('type')!r}; only 'text' is supported")
    if not isinstance(part.get("text"), str):
        raise RequestError(f"{where}.text must be a string")
    return str(part["text"])


def _plain_tool_calls(calls: Any, where: str) -> list[Any]:
    """Tool calls with parsed arguments: clients send JSON text, templates want the object."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise RequestError(f"{where} must be a list of objects")
    for i, call in enumerate(calls):
        function = call.get("function", call)
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            try:
                function["arguments"] = json.loads(function["arguments"] or "{}")
            except (ValueError, RecursionError) as error:
                raise RequestError(f"{where}[{i}]: arguments are not JSON: {error}") from error
    return calls


def _plain_tools(tools: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]] | None:
    if tools is None:
        return None
    if isinstance(tools, (str, bytes, Mapping)) or not isinstance(tools, Sequence):
        raise RequestError(f"tools must be a list of objects, not {type(tools).__name__}")
    for i, tool in enumerate(tools):
        if not isinstance(tool, Mapping):
            raise RequestError(f"tools[{i}] must be an object, not {type(tool).__name__}")
    return [_plain(tool, f"tools[{i}]") for i, tool in enumerate(tools)] or None


def _plain(value: Any, where: str, depth: int = 0) -> Any:
    """A copy in JSON's types, so that a template meets no object with methods of its own."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if depth > 64:
        raise RequestError(f"{where} is nested more than 64 levels deep")
    if isinstance(value, Mapping):
        if not all(type(key) is str for key in value):
            raise RequestError(f"{where} has a key that is not a string")
        return {key: _plain(item, f"{where}.{key}", depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{where}[{i}]", depth + 1) for i, item in enumerate(value)]
    raise RequestError(f"{where} has type {type(value).__name__}; only JSON's types are supported")


def _map_strings(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(key): _map_strings(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [_map_strings(item, change) for item in value]
    return value


def _strings(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _strings(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _strings(item)


def _unused_sentinel(value: Any) -> str:
    free = set(SENTINELS)
    for text in _strings(value):
        free.difference_update(text)
    if not free:
        raise RequestError("the messages use every noncharacter from U+FDD0 to U+FDEF")
    return min(free)
