"""Too many, gone, broken: what one request meets, and that its neighbours do not."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from multilora import AsyncEngine, EngineConfig
from multilora.server.app import create_app
from multilora.server.run import Server
from tests.harness.streams import is_clean

from .conftest import NAMES, SETTINGS, Ask, Stepwise

openai = pytest.importorskip("openai")


def test_beyond_what_may_wait_it_is_429() -> None:
    """The others are answered."""

    async def main() -> None:
        config = EngineConfig(**{**SETTINGS, "max_num_seqs": 2})
        engine = AsyncEngine(config, max_waiting=2)
        transport = httpx.ASGITransport(create_app(engine, NAMES))
        async with httpx.AsyncClient(transport=transport, base_url="http://here/v1") as http:
            api = openai.AsyncOpenAI(
                base_url="http://here/v1", api_key="none", http_client=http, max_retries=0
            )
            asked = [api.completions.create(model="uma", prompt="Hello") for _ in range(20)]
            found = await asyncio.gather(*asked, return_exceptions=True)
            refused = [one for one in found if isinstance(one, openai.RateLimitError)]
            assert len(refused) + sum(not isinstance(one, Exception) for one in found) == 20
            assert 0 < len(refused) < 20
            assert refused[0].response.headers["retry-after"] == "1"
            assert refused[0].code == "rate_limit_exceeded"
            many = await http.post("/completions", json={"prompt": ["Hello"] * 9})
            assert many.status_code == 429  # all of it or nothing
        await is_clean(engine)
        await engine.shutdown()

    asyncio.run(main())


@pytest.mark.parametrize("stream", [False, True])
def test_an_adapter_that_cannot_be_read_is_an_error_without_paths(
    engine: AsyncEngine, ask: Ask, tmp_path: Path, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    asyncio.run(engine.register_adapter("broken", tmp_path / "nowhere"))
    body = {"model": "broken", "prompt": "Hello", "stream": stream}
    found = ask("POST", "/v1/completions", json=body)
    asyncio.run(engine.unload_adapter("broken"))
    assert found.status_code == 500
    assert "cmpl-" in found.json()["error"]["message"]
    assert "nowhere" not in found.text
    assert "nowhere" in caplog.text


@pytest.mark.seconds
def test_after_a_hundred_that_have_gone_nothing_is_left(
    server: Server, engine: AsyncEngine, stepwise: Stepwise
) -> None:
    """At any point of a request; one that stays has its bits."""
    host, port = server.url.removeprefix("http://").split(":")
    body = json.dumps({"prompt": "Hello", "max_tokens": 100, "stream": True}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    message = head + b"Content-Length: %d\r\n\r\n" % len(body) + body

    async def leave(i: int) -> None:
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(message[: i * 7] if i % 4 == 0 else message)
        await writer.drain()
        if i % 4 > 1:
            await reader.read(1 + i)
        writer.transport.abort()

    async def stay() -> str:
        async with httpx.AsyncClient(timeout=60) as client:
            fields = {"temperature": 0, "max_tokens": 60, "model": "feedback"}
            found = await client.post(
                f"{server.url}/v1/completions", json={"prompt": "Hello", **fields}
            )
            text: str = found.json()["choices"][0]["text"]
            return text

    async def main() -> str:
        text, *_ = await asyncio.gather(stay(), *(leave(i) for i in range(100)))
        deadline = time.monotonic() + 10
        while engine.num_requests:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.01)
        await is_clean(engine)
        return text

    expected = stepwise.answer("Hello", "feedback", temperature=0, max_tokens=60)
    assert asyncio.run(main()) == expected.outputs[0].text


def test_who_does_not_read_holds_nobody(server: Server, engine: AsyncEngine) -> None:
    async def main() -> None:
        host, port = server.url.removeprefix("http://").split(":")
        fields = {"prompt": "Hello", "max_tokens": 100, "ignore_eos": True, "logprobs": 5}
        body = json.dumps({**fields, "n": 8, "stream": True}).encode()
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        _, writer = await asyncio.open_connection(host, int(port), limit=1)
        writer.write(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        async with httpx.AsyncClient(timeout=60) as client:
            asked: dict[str, Any] = {"prompt": "Hello", "max_tokens": 20}
            for _ in range(3):
                found = await client.post(f"{server.url}/v1/completions", json=asked)
                assert found.status_code == 200
        writer.transport.abort()
        while engine.num_requests:
            await asyncio.sleep(0.01)

    asyncio.run(main())


@pytest.mark.seconds
def test_a_megabyte_of_nonsense_holds_the_event_loop_shortly(ask: Ask) -> None:
    for content in (
        b'{"prompt": [' + b"5," * 10**6 + b'"a"]}',
        b'{"prompt": "a", "stop": [' + b"1," * 10**6 + b"1]}",
        b'{"prompt": "a", ' + b",".join(b'"f%d": 1' % i for i in range(10**5)) + b"}",
    ):
        begin = time.perf_counter()
        headers = {"content-type": "application/json"}
        found = ask("POST", "/v1/completions", content=content, headers=headers)
        assert found.status_code == 400
        assert len(found.text) < 500
        assert time.perf_counter() - begin < 2  # 15 s when each item had errors of its own
