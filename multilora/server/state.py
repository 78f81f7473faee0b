"""What the routes of one app share: the engine, its names, and threads for prompts."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import Request

from ..adapters.mix import names_of
from ..errors import RequestError, shown
from ..tokenization.chat_template import RESERVED
from .errors import HttpError, model_not_found
from .metrics import Metrics

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from ..adapters.mix import AdapterSpec
    from ..engine.engine import Engine
    from ..serving.async_engine import AsyncEngine
    from ..tokenization.tokenizer import Tokenizer
    from .settings import ServerSettings

_Result = TypeVar("_Result")
RENDERERS = 2  # threads for prompts: the event loop is for streams


class ServerState:
    """One for each app; of its event loop alone."""

    def __init__(self, engine: AsyncEngine, settings: ServerSettings) -> None:
        self.engine, self.settings = engine, settings
        self.served = settings.served_model_name or (engine.config.model,)
        self.created = int(time.time())
        self.metrics = Metrics(self.served[0])
        self._threads = ThreadPoolExecutor(RENDERERS, "multilora-prompts")

    async def adapter(self, model: str | None, weights: Mapping[str, float] | None) -> AdapterSpec:
        """The adapters that a request means. HttpError for a name that cannot be one.

        Whether there is an adapter of a name, the engine says.
        """
        if model is None or model in self.served:
            return None if weights is None else dict(weights)
        if weights is not None:
            raise HttpError(
                400,
                f"adapter_weights are for the base: give model={self.served[0]!r}, and in "
                "adapter_weights all adapters",
                param="adapter_weights",
            )
        base = next((name for name in self.served if model.startswith(f"{name}:")), None)
        if base is None or await self.has_adapter(model):
            return model
        return model[len(base) + 1 :]

    async def has_adapter(self, name: str) -> bool:
        """Whether it can be asked for."""
        return await self.engine.call(lambda own: own.has_adapter(name))

    async def check_model(self, model: str | None) -> None:
        """An HttpError for a name that is none of ours."""
        spec = await self.adapter(model, None)
        unknown = await self.engine.call(partial(_unknown, spec))
        if unknown is not None:
            raise model_not_found(f"no adapter is named {shown(unknown)}")

    @property
    def tokenizer(self) -> Tokenizer:
        """HttpError where only token ids are served."""
        if self.engine.tokenizer is None:
            raise HttpError(400, "this server has no tokenizer; send token ids to /v1/completions")
        return self.engine.tokenizer

    async def beside(self, function: Callable[..., _Result], *args: Any, **more: Any) -> _Result:
        """Calls something that takes a while on another thread."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, partial(function, *args, **more))

    async def chat_prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        variables: Mapping[str, Any] | None,
        spec: AdapterSpec,
        **ask: Any,
    ) -> tuple[str, list[int]]:
        """Text and ids of a conversation."""
        variables = variables or {}
        if taken := variables.keys() & RESERVED:
            raise RequestError(f"chat_template_kwargs may not have {min(taken)}")
        if self.engine.config.adapter_chat_template != "ignore":
            own = await self.engine.call(lambda engine: engine.adapter_chat_template(spec))
            ask |= {} if own is None else {"chat_template": own}
        longest = self.engine.max_model_len - 1  # and one new token
        return await self.beside(
            self.tokenizer.chat_prompt, messages, max_length=longest, **variables, **ask
        )

    async def close(self) -> None:
        """At the end of the app."""
        await self.engine.shutdown()
        self._threads.shutdown(wait=False, cancel_futures=True)


def _unknown(spec: AdapterSpec, engine: Engine) -> str | None:
    """The first name that there is not; an AdapterNotFound for a version that it is not at."""
    for name in names_of(spec):
        if not engine.has_adapter(name):
            return name
        if engine.store.has(name):
            engine.store.resolve(spec)
    return None


def state_of(request: Request) -> ServerState:
    """That of the app which the request came to."""
    found: ServerState = request.app.state.server
    return found
