"""Health, version, figures."""

from __future__ import annotations

import asyncio

import httpx

from multilora import AsyncEngine, EngineConfig, __version__
from multilora.server.app import create_app

from .conftest import SETTINGS, Ask


def test_a_server_that_takes_requests_is_well(ask: Ask) -> None:
    for method, path in (("GET", "/health"), ("GET", "/ping"), ("POST", "/ping")):
        assert ask(method, path).status_code == 200
    assert ask("GET", "/version").json() == {"version": __version__}


def test_one_that_drains_or_is_dead_is_not() -> None:
    async def main() -> None:
        engine = AsyncEngine(EngineConfig(**SETTINGS))
        transport = httpx.ASGITransport(create_app(engine))
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            await engine.drain()
            for found in (
                await client.get("/health"),
                await client.post("/v1/completions", json={"prompt": "Hello"}),
                await client.post("/v1/completions", json={"prompt": "Hello", "stream": True}),
            ):
                assert (found.status_code, found.headers["retry-after"]) == (503, "10")
                assert found.json()["error"]["code"] == "draining"
            assert (await client.get("/metrics")).status_code == 200
            await engine.shutdown()
            assert (await client.get("/metrics")).status_code == 503

    asyncio.run(main())


def test_figures_tell_of_requests_by_adapter(ask: Ask) -> None:
    body = {"model": "feedback", "prompt": "Hello", "max_tokens": 3, "ignore_eos": True}
    assert ask("POST", "/v1/completions", json=body).status_code == 200
    found = ask("GET", "/metrics")
    assert found.headers["content-type"].startswith("text/plain")
    assert "multilora_engine_generated_tokens_total" in found.text
    assert "multilora_engine_running 0.0" in found.text
