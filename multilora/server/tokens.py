"""`/tokenize` and `/detokenize`."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from ..errors import RequestError, shown
from .generation import encode_prompt, template_options
from .schemas import DetokenizeBody, TokenizeBody
from .state import state_of

routes = APIRouter()


@routes.post("/tokenize")
async def tokenize(body: TokenizeBody, request: Request) -> dict[str, Any]:
    """The ids of a prompt or a conversation, as requests get them."""
    state = state_of(request)
    await state.check_model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise RequestError("give prompt or messages")
    if body.messages is not None:
        if body.add_special_tokens is not None:
            raise RequestError("add_special_tokens is for a prompt: a template adds its own")
        spec = await state.adapter(body.model, None)
        _, ids = await state.chat_prompt(
            body.messages, body.chat_template_kwargs, spec, **template_options(body)
        )
    else:
        if template_options(body) or body.chat_template_kwargs is not None:
            raise RequestError("options of a chat template are for messages, not for a prompt")
        special = body.add_special_tokens is not False
        ids = await state.beside(
            encode_prompt, state, body.prompt or "", add_special_tokens=special
        )
    found = {"count": len(ids), "max_model_len": state.engine.max_model_len, "tokens": ids}
    if body.return_token_strs:
        decode = state.tokenizer.decode
        found["token_strs"] = [decode([token], skip_special_tokens=False) for token in ids]
    return found


@routes.post("/detokenize")
async def detokenize(body: DetokenizeBody, request: Request) -> dict[str, str]:
    """The text of ids, special tokens among it."""
    state = state_of(request)
    await state.check_model(body.model)
    if wrong := [token for token in body.tokens if not 0 <= token < 2**31]:
        raise RequestError(f"tokens: {shown(wrong[0])} is no token id")
    decode = state.tokenizer.decode
    return {"prompt": await state.beside(decode, body.tokens, skip_special_tokens=False)}
