"""Every path needs the key, and no body is larger than may be."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from multilora import AsyncEngine
from multilora.server.app import create_app
from multilora.server.guard import ADMIN, OPEN
from multilora.server.settings import ServerSettings

from .conftest import Ask

DATA, OTHER, MASTER = "data-key-1", "data-key-2", "admin-key"
LOCKED = ServerSettings(api_keys=(DATA, OTHER), admin_keys=(MASTER,), enable_lora_admin=True)


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_no_path_but_the_open_ones_answers_without_its_key(engine: AsyncEngine, ask: Ask) -> None:
    paths: dict[str, Any] = create_app(engine, LOCKED).openapi()["paths"]
    asked = [(path, method.upper()) for path, methods in paths.items() for method in methods]
    for path, method in (*asked, ("/nothing", "GET"), ("/openapi.json", "GET")):
        statuses = [
            ask(method, path, LOCKED, headers=headers).status_code
            for headers in ({}, bearer("wrong-key"), bearer(DATA), bearer(MASTER))
        ]
        if path in OPEN:
            assert statuses == [200] * 4
        elif path in ADMIN:
            assert statuses == [401, 401, 403, 400], path  # without a body
        else:
            assert statuses[:2] == [401, 401], path
            assert statuses[2] not in (401, 403), path
            assert statuses[3] == 401, path


def test_any_of_the_keys_opens(ask: Ask) -> None:
    for key in (DATA, OTHER):
        assert ask("GET", "/v1/models", LOCKED, headers=bearer(key)).status_code == 200


@pytest.mark.parametrize(
    "header", ["", "Bearer", "Bearer ", f"Basic {DATA}", DATA, f"Bearer {DATA}x", "Bearer \xff\xfe"]
)
def test_other_headers_do_not_open(ask: Ask, header: str) -> None:
    headers = {"Authorization": header.encode("latin-1")}
    found = ask("GET", "/v1/models", LOCKED, headers=headers)
    assert (found.status_code, found.headers["www-authenticate"]) == (401, "Bearer")
    assert found.json()["error"]["code"] == "invalid_api_key"
    assert DATA not in found.text


def test_where_the_app_is_mounted_the_admin_key_is_still_needed(engine: AsyncEngine) -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    scope = {
        "type": "http",
        "method": "POST",
        "root_path": "/sub",
        "path": "/sub/v1/load_lora_adapter",
        "headers": [(b"authorization", f"Bearer {DATA}".encode())],
        "query_string": b"",
    }
    asyncio.run(create_app(engine, LOCKED)(scope, receive, send))
    assert sent[0]["status"] == 403


def test_a_body_that_is_too_large_is_refused(ask: Ask) -> None:
    small = ServerSettings(max_body_bytes=100)

    async def pieces() -> Any:
        for _ in range(1000):
            yield b" " * 10

    for content in (b" " * 101, pieces()):
        found = ask("POST", "/v1/completions", small, content=content)
        assert (found.status_code, found.json()["error"]["code"]) == (413, "body_too_large")
