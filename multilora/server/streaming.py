"""Server-sent events, several streams as one, and clients that go."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Mapping, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi.responses import StreamingResponse

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

_Item = TypeVar("_Item")
DONE = b"data: [DONE]\n\n"
# Made once: `json.dumps` with these would make an encoder for every event.
_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


class ClientGoneError(Exception):
    """Nobody waits for the answer any more."""


async def unless_gone(receive: Receive, work: Awaitable[_Item]) -> _Item:
    """What `work` gives; it is cancelled, and ClientGoneError raised, when the client goes."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def merged(
    sources: Sequence[AsyncGenerator[_Item, None]],
) -> AsyncGenerator[tuple[int, _Item], None]:
    """What comes from any of the sources, with its place among them; all are closed at the end."""
    if len(sources) == 1:
        async with aclosing(sources[0]) as only:
            async for item in only:
                yield 0, item
        return
    waiting = {asyncio.ensure_future(anext(source)): i for i, source in enumerate(sources)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in sorted(done, key=lambda one: waiting[one]):
                i = waiting.pop(task)
                try:
                    item = task.result()
                except StopAsyncIteration:
                    continue
                waiting[asyncio.ensure_future(anext(sources[i]))] = i
                yield i, item
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        for source in sources:
            await source.aclose()


def event(data: Mapping[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + _json(data).encode("utf-8", "replace") + b"\n\n"


class EventStream(StreamingResponse):
    """Sends events until there are no more, or the client goes: then their source is closed."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        # A proxy that collects what comes would make a stream of it that is none.
        super().__init__(events, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends all."""
        try:
            await unless_gone(receive, self.stream_response(send))
        except (ClientGoneError, OSError):  # by the protocol, or by a closed socket
            pass
        finally:
            await self._events.aclose()
