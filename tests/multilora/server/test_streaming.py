"""Several streams as one, and clients that go."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import pytest

from multilora.server.streaming import ClientGoneError, EventStream, event, merged, unless_gone


class Source:
    """Gives its items one by one, and knows whether it was closed."""

    def __init__(self, items: Sequence[Any], error: Exception | None = None) -> None:
        self.items, self.error, self.is_closed = items, error, False

    async def read(self) -> AsyncGenerator[Any, None]:
        try:
            for item in self.items:
                await asyncio.sleep(0)
                yield item
            if self.error is not None:
                raise self.error
        finally:
            self.is_closed = True


@pytest.mark.parametrize("count", [1, 3])
def test_all_items_come_with_their_place_in_order(count: int) -> None:
    async def main() -> None:
        sources = [Source(range(4 + i)) for i in range(count)]
        found: dict[int, list[int]] = {i: [] for i in range(count)}
        async for i, item in merged([source.read() for source in sources]):
            found[i].append(item)
        assert found == {i: list(range(4 + i)) for i in range(count)}
        assert all(source.is_closed for source in sources)

    asyncio.run(main())


@pytest.mark.parametrize("count", [1, 3])
def test_an_error_of_one_ends_all(count: int) -> None:
    async def main() -> None:
        sources = [Source([1], ValueError("x")), *(Source(range(99)) for _ in range(count - 1))]
        with pytest.raises(ValueError, match="x"):
            async for _ in merged([source.read() for source in sources]):
                pass
        assert all(source.is_closed for source in sources)

    asyncio.run(main())


def test_who_leaves_closes_all() -> None:
    async def main() -> None:
        sources = [Source(range(99)) for _ in range(3)]
        stream = merged([source.read() for source in sources])
        await anext(stream)
        await stream.aclose()
        assert all(source.is_closed for source in sources)

    asyncio.run(main())


def test_work_ends_when_the_client_goes() -> None:
    async def main() -> None:
        ended = asyncio.Event()

        async def work() -> None:
            try:
                await asyncio.sleep(60)
            finally:
                ended.set()

        async def leaves() -> dict[str, Any]:
            await asyncio.sleep(0.01)
            return {"type": "http.disconnect"}

        async def stays() -> dict[str, Any]:
            await asyncio.sleep(60)
            return {}

        with pytest.raises(ClientGoneError):
            await unless_gone(leaves, work())
        assert ended.is_set()
        assert await unless_gone(stays, asyncio.sleep(0, "done")) == "done"

    asyncio.run(main())


@pytest.mark.parametrize("how", ["message", "socket"])
def test_a_stream_that_nobody_reads_is_closed(how: str) -> None:
    async def main() -> None:
        source = Source([b"x"] * 10**6)
        sent: list[Any] = []

        async def receive() -> dict[str, Any]:
            await asyncio.sleep(0.01 if how == "message" else 60)
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)
            if how == "socket" and len(sent) > 3:
                raise OSError
            await asyncio.sleep(0)

        await EventStream(source.read())({"type": "http"}, receive, send)
        assert source.is_closed
        assert 0 < len(sent) < 10**6

    asyncio.run(main())


def test_an_event_is_one_line_of_json() -> None:
    made = event({"text": "a\nb\r\u2028é\ud800"})
    assert made.startswith(b"data: ")
    assert made.endswith(b"\n\n")
    assert b"\n" not in made[:-2]
    assert b"\r" not in made
    assert json.loads(made[6:])["text"] == "a\nb\r\u2028é?"
