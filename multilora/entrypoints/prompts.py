"""What `LLM` takes, in the shapes that it may have: prompts, conversations, one thing for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..arguments import read
from ..errors import RequestError, shown

Prompt = str | Sequence[int] | Mapping[str, Any]
"""Text, token ids, or {"prompt": text} and {"prompt_token_ids": ids}, both of which may stand."""

Message = Mapping[str, Any]  # {"role": ..., "content": ...}


def as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """A list of prompts from one or many."""
    if isinstance(prompts, str | Mapping):
        return [_as_prompt(prompts, "the prompt")]
    if not isinstance(prompts, Sequence) or isinstance(prompts, bytes):
        raise RequestError(
            f"prompts must be text, token ids or a list of them, not {shown(prompts)}"
        )
    if read(lambda given: len(given) and isinstance(given[0], int), prompts, "prompts"):
        return [prompts]  # type: ignore[list-item]  # one of token ids, however long
    items = read(list, prompts, "prompts")
    return [_as_prompt(item, f"prompt {i}") for i, item in enumerate(items)]


def _as_prompt(item: object, name: str) -> Prompt:
    """The item, if the engine can take it for a prompt."""
    if isinstance(item, int | bytes) or not isinstance(item, Sequence | Mapping):
        raise RequestError(f"{name} must be text or a list of token ids, not {shown(item)}")
    return item


def as_conversations(messages: object) -> list[list[Message]]:
    """A list of conversations from one or many."""
    if isinstance(messages, str) or not isinstance(messages, Sequence):
        raise RequestError(
            'messages must be a list like [{"role": "user", "content": "..."}], '
            f"or a list of such lists, not {type(messages).__name__}"
        )
    single: list[Message] = []
    many: list[list[Message]] = []
    for item in read(list, messages, "messages"):
        if isinstance(item, Mapping):
            single.append(item)
        elif isinstance(item, Sequence) and not isinstance(item, str):
            many.append(read(list, item, "messages"))
        else:
            raise RequestError(f"a message must be a dict with role and content, not {shown(item)}")
    if single and many:
        raise RequestError("messages mixes messages with conversations; give one or the other")
    return many or ([single] if single else [])


def for_each(value: Any, count: int, what: str) -> list[Any]:
    """`value` for each of `count` prompts: it is one for all, or a list of as many."""
    if not isinstance(value, list | tuple):
        return [value] * count
    found = read(list, value, what)
    if len(found) != count:
        raise RequestError(
            f"{what} has {len(found)} entries for {count} prompts; give one for each, or one "
            "for all"
        )
    return found
