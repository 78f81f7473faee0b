"""The ASGI app over an `AsyncEngine`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from fastapi import FastAPI

from ..version import __version__
from . import admin, generation, models, probes, tokens
from .errors import HANDLED, answer_error
from .guard import Guard
from .settings import ServerSettings
from .state import ServerState

if TYPE_CHECKING:
    from ..serving.async_engine import AsyncEngine


def create_app(engine: AsyncEngine, settings: ServerSettings | None = None) -> FastAPI:
    """The app, for any ASGI server; when its lifespan ends, so does the engine."""
    settings = ServerSettings() if settings is None else settings

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await app.state.server.close()

    # The pages of FastAPI's documentation load scripts from elsewhere: there are none.
    app = FastAPI(
        title="multilora", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None
    )
    app.state.server = ServerState(engine, settings)
    for part in (generation, models, tokens, probes):
        app.include_router(part.routes)
    if settings.enable_lora_admin:
        app.include_router(admin.routes)
    for kind in HANDLED:
        app.add_exception_handler(kind, answer_error)
    app.add_middleware(Guard, settings=settings)
    return app
