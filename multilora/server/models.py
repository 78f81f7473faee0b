"""`/v1/models`: the base and its adapters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request

from ..errors import shown
from .errors import model_not_found
from .state import ServerState, state_of

if TYPE_CHECKING:
    from ..engine.engine import Engine

routes = APIRouter()


@routes.get("/v1/models")
async def list_models(request: Request) -> dict[str, Any]:
    """All names that a request may give as `model`, mixes apart."""
    state = state_of(request)
    return {"object": "list", "data": await _cards(state)}


@routes.get("/v1/models/{name:path}")
async def show_model(name: str, request: Request) -> dict[str, Any]:
    """One of them."""
    for card in await _cards(state_of(request)):
        if card["id"] == name:
            return card
    raise model_not_found(f"no model is named {shown(name)}")


async def _cards(state: ServerState) -> list[dict[str, Any]]:
    engine = state.engine
    roots = await engine.call(_roots)
    bases = [_card(state, name, engine.config.model, None) for name in state.served]
    return bases + [
        _card(state, name, root, state.served[0]) for name, root in sorted(roots.items())
    ]


def _roots(engine: Engine) -> dict[str, str]:
    """Where each adapter came from; the digest of one that lay in memory."""
    loaded = {name: engine.adapter_path(name) or i.digest for name, i in engine.adapters.items()}
    return loaded | {name: i.path for name, i in engine.registered_adapters.items()}


def _card(state: ServerState, name: str, root: str, parent: str | None) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": state.created,
        "owned_by": "multilora",
        "root": root,
        "parent": parent,
        "max_model_len": state.engine.max_model_len,
    }
