"""Runs the app with uvicorn, and ends it gracefully."""

from __future__ import annotations

import asyncio
import logging
import socket
from typing import TYPE_CHECKING, Any

import uvicorn

from ..errors import ConfigError
from ..version import __version__
from .app import create_app
from .settings import LOOPBACK, ServerSettings

if TYPE_CHECKING:
    from types import FrameType

    from ..serving.async_engine import AsyncEngine

logger = logging.getLogger(__name__)
MAX_HEADER_BYTES = 64 << 10
LAST_WORDS = 5  # seconds in which clients may read what is left, once all requests have ended


def bound_socket(settings: ServerSettings) -> socket.socket:
    """The server's address, taken before a model is loaded. A ConfigError if it cannot be had."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    made = socket.socket(family)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((settings.host, settings.port))
    except OSError as error:
        made.close()
        raise ConfigError(
            f"{settings.host} port {settings.port} cannot be listened on: {error}; give another"
        ) from error
    return made


class Server(uvicorn.Server):
    """Serves an engine until it is told to end.

    At SIGTERM or Ctrl-C it takes no more requests and says so (503), lets those that it has finish
    for `drain_seconds`, and ends; at a second one it ends at once.
    """

    def __init__(self, engine: AsyncEngine, settings: ServerSettings) -> None:
        self.app = create_app(engine, settings)
        self.engine, self.settings = engine, settings
        self._drain: asyncio.Task[None] | None = None
        self._is_ending = False
        config = uvicorn.Config(
            self.app,
            host=settings.host,
            port=settings.port,
            http="h11",  # it bounds headers
            ws="none",
            h11_max_incomplete_event_size=MAX_HEADER_BYTES,
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=LAST_WORDS,
        )
        super().__init__(config)

    @property
    def url(self) -> str:
        """Where it listens, once it has started."""
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    async def startup(self, sockets: Any = None) -> None:
        """Listens, and says where and what."""
        await super().startup(sockets)
        if not self.started:
            return
        memory, names = await self.engine.call(
            lambda own: (own.memory(), {*own.adapters, *own.registered_adapters})
        )
        config = self.engine.config
        logger.info(
            "multilora %s serves %s with %d adapters at %s: %.1f MiB of weights, %.1f MiB for KV, "
            "%.1f MiB for rank pages, %d requests at once of %d tokens at most",
            __version__,
            " ".join(self.app.state.server.served),
            len(names),
            self.url,
            *(memory[key] / 2**20 for key in ("base", "kv_capacity", "adapter_capacity")),
            config.max_num_seqs,
            self.engine.max_model_len,
        )
        if not self.settings.api_keys and self.settings.host not in LOOPBACK:
            logger.warning("it listens on %s and asks for no API key", self.settings.host)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """At a signal, which may come amid anything."""
        if self._is_ending:
            self.should_exit = self.force_exit = True
        self._is_ending = True

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: begins to drain when a signal has come."""
        if self._is_ending and self._drain is None:
            self._drain = asyncio.ensure_future(self._end())
        return await super().on_tick(counter)

    async def _end(self) -> None:
        """Lets requests finish; those that are too slow are told so."""
        logger.info("draining: no more requests are taken")
        try:
            if not await self.engine.drain(self.settings.drain_seconds):
                logger.warning("%d requests were cut", self.engine.num_requests)
                await self.engine.shutdown()
        except Exception as error:  # a dead engine has nothing to drain
            logger.error("the engine could not be drained: %s", error)
        self.should_exit = True
