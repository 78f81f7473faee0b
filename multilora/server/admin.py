"""`/v1/load_lora_adapter` and `/v1/unload_lora_adapter`, where they are switched on."""

from __future__ import annotations

import logging

from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse

from ..adapters.mix import check_name
from ..errors import AdapterError, AdapterInvalid, AdapterNotFound, shown
from .errors import HttpError, model_not_found
from .schemas import LoadAdapterBody, UnloadAdapterBody
from .state import state_of

logger = logging.getLogger(__name__)
routes = APIRouter()


@routes.post("/v1/load_lora_adapter")
async def load(body: LoadAdapterBody, request: Request) -> PlainTextResponse:
    """Serves a PEFT folder of the server's machine under a name, once it has been read."""
    state, name = state_of(request), body.lora_name
    if name in state.served:
        raise HttpError(400, f"{shown(name)} is the base; give the adapter another name")
    try:
        check_name(name)
        if not body.load_inplace and await state.has_adapter(name):
            raise HttpError(
                400,
                f"the adapter {shown(name)} is loaded; unload it first, or set load_inplace",
                param="lora_name",
            )
        digest = await state.engine.load_adapter(name, body.lora_path)
    except AdapterInvalid as error:
        raise HttpError(400, str(error), param="lora_path") from error
    except AdapterError as error:
        raise HttpError(400, str(error)) from error
    logger.info("adapter %s: loaded from %s, digest %s", name, shown(body.lora_path), digest)
    return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")


@routes.post("/v1/unload_lora_adapter")
async def unload(body: UnloadAdapterBody, request: Request) -> PlainTextResponse:
    """Forgets a name; requests in flight finish."""
    state, name = state_of(request), body.lora_name
    try:
        await state.engine.unload_adapter(name)
    except AdapterNotFound as error:
        raise model_not_found(error) from error
    state.metrics.forget(name)
    logger.info("adapter %s: unloaded", name)
    return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")
