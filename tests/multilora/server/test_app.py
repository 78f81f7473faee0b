"""The app as a whole: its paths, and that its end is the engine's."""

from __future__ import annotations

import asyncio
import json

import pytest

from multilora import AsyncEngine, EngineConfig, errors
from multilora.server.app import create_app
from multilora.server.settings import ServerSettings

from .conftest import SETTINGS, Ask


def test_the_engine_ends_with_the_app() -> None:
    engine = AsyncEngine(EngineConfig(**SETTINGS))

    async def main() -> None:
        app = create_app(engine)
        async with app.router.lifespan_context(app):
            await engine.check_health()
        with pytest.raises(errors.EngineClosedError):
            await engine.check_health()

    asyncio.run(main())


def test_its_paths_are_these(engine: AsyncEngine) -> None:
    paths = set(create_app(engine).openapi()["paths"])
    assert paths == {
        *("/v1/completions", "/v1/chat/completions", "/v1/models", "/v1/models/{name}"),
        *("/tokenize", "/detokenize", "/health", "/ping", "/version", "/metrics"),
    }
    settings = ServerSettings(enable_lora_admin=True)
    more = set(create_app(engine, settings).openapi()["paths"]) - paths
    assert more == {"/v1/load_lora_adapter", "/v1/unload_lora_adapter"}


def test_other_paths_methods_and_bodies_are_errors_of_the_known_form(ask: Ask) -> None:
    for method, path, request, status in (
        ("GET", "/v1/nothing", {}, 404),
        ("GET", "/docs", {}, 404),
        ("GET", "/v1/completions", {}, 405),
        ("POST", "/v1/completions", {"content": b"{"}, 400),
        ("POST", "/v1/completions", {"content": b"[1]"}, 400),
        ("POST", "/v1/completions", {"content": b""}, 400),
        ("POST", "/v1/completions", {"content": b'{"prompt": "\xff"}'}, 400),
        ("POST", "/v1/completions", {"content": b'{"prompt": "a", "temperature": NaN}'}, 400),
        ("POST", "/v1/completions", {"content": rb'{"prompt": "\ud800"}'}, 400),
        ("POST", "/v1/completions", {"content": b"[" * 100_000}, 400),
        ("POST", "/v1/completions", {"content": b'{"n": 1' + b"0" * 5000 + b"}"}, 400),
    ):
        headers = {"content-type": "application/json"}
        found = ask(method, path, headers=headers, **request)
        assert found.status_code == status, (path, request, found.text[:300])
        assert json.loads(found.text)["error"]["message"]
        assert "Traceback" not in found.text
