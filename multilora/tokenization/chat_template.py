"""Messages become the text of a prompt through the model folder's Jinja template.

The template comes with the base model; requests never bring one. It still runs in a process of its
own (`template_process`). Its words for the caller (`raise_exception`) are a RequestError;
everything else that goes wrong inside is a TokenizerError.
"""

from __future__ import annotations

import logging
import re
from bisect import bisect_right
from typing import TYPE_CHECKING, Any, NamedTuple

from ..arguments import flag
from ..config.model import read_json
from ..errors import CheckpointError, RequestError, TokenizerError, shown
from .messages import REASONING, Conversation
from .template_process import PROCESS, TemplateLimitError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

logger = logging.getLogger(__name__)

TIME_LIMIT = 2.0  # seconds of processor time for one rendering
MAX_CHARS = 1 << 21  # of the rendered text; messages, tools and variables: half of it
MAX_FILE = 4 << 20  # bytes of a file that is looked at in an adapter's folder
# Arguments of a rendering, which no variable of a template may be called.
RESERVED = frozenset(
    {"messages", "tools", "add_generation_prompt", "continue_final_message", "max_length"}
    | {"chat_template", "tokenize"}
)
CONTINUE = "CONTINUE_FINAL_MESSAGE_TAG "  # stands, while it renders, where the text shall end
# A template that goes through the parts of a message; to others they are given as one text.
TAKES_PARTS = re.compile(r"\bfor\s+\w+\s+in\s+[\w.]*(\bcontent\b|\[\s*['\"]content['\"]\s*\])")

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


class RenderedChat(NamedTuple):
    """The text of a conversation, and which of its characters the template wrote."""

    text: str
    runs: list[int]  # where the template's text begins and ends, by turns

    def is_template(self, start: int, end: int) -> bool:
        """Whether all of the text from start to end is the template's."""
        i = bisect_right(self.runs, start)
        return i % 2 == 1 and end <= self.runs[i]


class ChatTemplate:
    """The chat templates of one model folder, by name."""

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
        self.sources = dict(sources)
        self._variables = dict(variables)
        self._limits = (time_limit, max_chars)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool | str = False,  # or the field to go on with, not "content"
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,  # the name of one of them, or a template's own text
        **variables: Any,  # of the template, such as date_string or enable_thinking
    ) -> RenderedChat:
        """The prompt text, equal to transformers'. Arguments as in its `apply_chat_template`."""
        conversation = Conversation(self._limits[1] // 2)
        add_generation_prompt = flag(add_generation_prompt, "add_generation_prompt")
        if not isinstance(continue_final_message, str):
            continue_final_message = flag(continue_final_message, "continue_final_message")
        plain_tools = conversation.tools(tools)
        source = self._source(plain_tools, chat_template)
        chat = conversation.messages(messages, join_parts=TAKES_PARTS.search(source) is None)
        given = conversation.plain(variables, "chat_template_kwargs")
        last = None
        if continue_final_message:
            if add_generation_prompt:
                raise RequestError(
                    "continue_final_message goes on with the last message; "
                    "set add_generation_prompt=False"
                )
            field = continue_final_message if isinstance(continue_final_message, str) else "content"
            last = _mark_end(chat, field, source)
        given |= {
            "messages": chat,
            "tools": plain_tools,
            "documents": given.get("documents"),
            "add_generation_prompt": add_generation_prompt,
        }
        rendered = self._run(source, given)
        return rendered if last is None else _cut(rendered, last)

    def _source(self, tools: list[dict[str, Any]] | None, asked: str | None) -> str:
        if asked is not None and not isinstance(asked, str):
            raise RequestError(f"chat_template must be a name or a text, not {shown(asked)}")
        name = "tool_use" if tools and "tool_use" in self.sources else "default"
        source = self.sources[name] if asked is None else self.sources.get(asked, asked)
        if tools and not re.search(r"\btools\b", source):
            raise RequestError(f"{self._where(source)} has no place for tools")
        return source

    def _where(self, source: str) -> str:
        """What to call a template in errors: the tokenizer's own, or the one that was given."""
        if source in self.sources.values():
            return f"the chat template of {self.origin}"
        return "the template given as chat_template"

    def _run(self, source: str, given: dict[str, Any]) -> RenderedChat:
        seconds, max_chars = self._limits
        own = {name: text for name, text in self._variables.items() if name not in given}
        request = {"source": source, "own": own, "given": given, "max_chars": max_chars}
        where = self._where(source)
        try:
            reply = PROCESS.ask(request, seconds)
        except TemplateLimitError as error:
            raise TokenizerError(f"{where} {error}") from error
        if "error" not in reply:
            return RenderedChat(reply["text"], reply["runs"])
        if reply["error"] == "refused":
            raise RequestError(f"{where} refuses: {reply['what']}")
        if reply["error"] == "undefined":
            raise RequestError(
                f"{where} misses something in the messages or tools: {reply['what']}"
            )
        verb = "does not compile" if reply["error"] == "compile" else "failed"
        raise TokenizerError(f"{where} {verb}: {reply['what']}")


def _mark_end(chat: list[dict[str, Any]], field: str, source: str) -> str:
    """Marks the end of the last message's text, and returns that text."""
    end, key = chat[-1], field
    if field == "content" and isinstance(end.get(field), list) and end[field]:
        end, key = end[field][-1], "text"
    text = end.get(key)
    if not isinstance(text, str):
        raise RequestError(f"continue_final_message: the last message has no text as {field!r}")
    names = [n for n in REASONING if end.get(n) == text] if field in REASONING else [key]
    if not any(name in source for name in names):
        raise RequestError(f"continue_final_message: the chat template never reads {field!r}")
    for name in names:
        end[name] = text + CONTINUE
    return text


def _cut(rendered: RenderedChat, last: str) -> RenderedChat:
    """The text up to the end of the last message, as transformers cuts it."""
    text, tag = rendered.text, CONTINUE.strip()
    if tag not in text or last.strip() not in text:
        raise RequestError(
            "continue_final_message: the chat template leaves the last message out, or changes it"
        )
    at = text.rindex(tag)
    whole = text[at : at + len(CONTINUE)] == CONTINUE
    return rendered._replace(text=text[:at] if whole else text[:at].rstrip())


def find_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """The chat templates of a folder by name, as the table in `settings` says.

    Empty when it has none. Raises TokenizerError for a field or file of the wrong kind.
    """
    named = {"default": folder / "chat_template.jinja"}
    if not named["default"].is_file():
        named = {}
    named |= {path.stem: path for path in sorted(folder.glob("additional_chat_templates/*.jinja"))}
    if named:
        return {name: _read_template(path) for name, path in named.items()}
    found = config.get("chat_template")
    if found is None:
        return {}
    if isinstance(found, str):
        return {"default": found}
    try:
        templates = {entry["name"]: entry["template"] for entry in found}
    except (TypeError, KeyError):
        templates = {0: 0}
    if not all(isinstance(text, str) for pair in templates.items() for text in pair):
        raise TokenizerError(
            f"{folder / 'tokenizer_config.json'}: chat_template must be a string or a list of "
            '{"name": ..., "template": ...}'
        )
    return templates


def other_templates(folder: Path, templates: Mapping[str, str]) -> dict[str, str]:
    """The chat templates of a folder, e.g. an adapter's, by name, that are none of these."""
    config = folder / "tokenizer_config.json"
    more = folder.glob("additional_chat_templates/*.jinja")
    files = [p for p in (config, folder / "chat_template.jinja", *more) if p.is_file()]
    try:
        if not files or max(path.stat().st_size for path in files) > MAX_FILE:
            return {}
        found = find_templates(folder, read_json(config) if config in files else {})
    except (CheckpointError, TokenizerError, OSError, RecursionError) as error:
        logger.warning("the chat template in %s cannot be read: %s", folder, error)
        return {}
    known = {source.strip() for source in templates.values()}
    return {name: text for name, text in found.items() if text.strip() not in known}


def _read_template(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise TokenizerError(f"{path} cannot be read: {error}") from error
