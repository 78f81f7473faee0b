"""What those ask who watch the server: `/health`, `/ping`, `/version`, `/metrics`."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST

from ..version import __version__
from .state import state_of

routes = APIRouter()


@routes.get("/health")
@routes.get("/ping")
@routes.post("/ping")
async def health(request: Request) -> Response:
    """200 while requests are taken, 503 while it drains and when the engine is dead."""
    await state_of(request).engine.check_health()
    return Response()


@routes.get("/version")
async def version() -> dict[str, str]:
    """Ours."""
    return {"version": __version__}


@routes.get("/metrics")
async def metrics(request: Request) -> Response:
    """In Prometheus' text form; waits for the step that runs."""
    state = state_of(request)
    text = state.metrics.text(await state.engine.get_stats())
    return Response(text, media_type=CONTENT_TYPE_LATEST)
