"""Log probabilities in OpenAI's two forms, and in vLLM's of a prompt."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..outputs import Logprob, TokenLogprobs


def completion_logprobs(
    token_ids: Sequence[int], places: Sequence[TokenLogprobs | None], count: int, offset: int
) -> dict[str, Any]:
    """Of tokens whose text begins at character `offset`; `count` candidates at each place.

    A place of None is a prompt's first token, which nothing came before.
    """
    tokens, logprobs, tops, offsets = [], [], [], []
    for token, place in zip(token_ids, places, strict=True):
        text = "" if place is None else _text(place[token])
        tokens.append(text)
        logprobs.append(None if place is None else place[token].logprob)
        tops.append(None if place is None else _by_text(place, token, count))
        offsets.append(offset)
        offset += len(text)
    return {
        "tokens": tokens,
        "token_logprobs": logprobs,
        "top_logprobs": tops,
        "text_offset": offsets,
    }


def chat_logprobs(
    token_ids: Iterable[int], places: Iterable[TokenLogprobs], count: int
) -> dict[str, Any]:
    """Of a chat's answer."""
    content = []
    for token, place in zip(token_ids, places, strict=True):
        top = [_entry(one) for one in _best(place, count)]
        content.append({**_entry(place[token]), "top_logprobs": top})
    return {"content": content, "refusal": None}


def prompt_logprobs(
    places: Iterable[TokenLogprobs | None],
) -> list[dict[str, dict[str, Any]] | None]:
    """Of a prompt, as vLLM has them: by token id."""
    return [
        None
        if place is None
        else {
            str(token): {
                "logprob": one.logprob,
                "rank": one.rank,
                "decoded_token": one.decoded_token,
            }
            for token, one in place.items()
        }
        for place in places
    ]


def _text(one: Logprob) -> str:
    return one.decoded_token or ""


def _best(place: TokenLogprobs, count: int) -> list[Logprob]:
    """The likeliest, without a chosen one that is not among them."""
    return sorted(place.values(), key=lambda one: -one.logprob)[:count]


def _by_text(place: TokenLogprobs, token: int, count: int) -> dict[str, float]:
    """The likeliest by text, the best of those that share one, and the chosen token."""
    found: dict[str, float] = {}
    for one in (*_best(place, count), place[token]):
        found.setdefault(_text(one), one.logprob)
    return found


def _entry(one: Logprob) -> dict[str, Any]:
    """A token; its bytes are unknown where it is a part of a character."""
    text = _text(one)
    found = None if "\ufffd" in text else list(text.encode())
    return {"token": text, "logprob": one.logprob, "bytes": found}
