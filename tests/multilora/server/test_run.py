"""A server that is told to end lets its streams finish, and takes no more."""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from multilora import AsyncEngine, EngineConfig
from multilora.errors import ConfigError
from multilora.server.run import Server, bound_socket
from multilora.server.settings import ServerSettings

from .conftest import SETTINGS, loopback

BODY = {"prompt": "Hello", "max_tokens": 40, "stream": True, "ignore_eos": True}


@pytest.fixture
def made() -> Iterator[Any]:
    """Makes a server of its own over a slow engine."""
    engine = AsyncEngine(EngineConfig(**SETTINGS))

    def make(**settings: Any) -> Server:
        return Server(engine, ServerSettings(port=0, **settings))

    def slow(own: Any) -> None:
        step = own.step
        own.step = lambda: (time.sleep(0.02), step())[1]

    asyncio.run(engine.call(slow))
    yield make
    asyncio.run(engine.shutdown())


def read(url: str, found: list[str]) -> threading.Thread:
    """Reads a stream on a thread, by now begun."""
    started = threading.Event()

    def main() -> None:
        with httpx.stream("POST", f"{url}/v1/completions", json=BODY, timeout=30) as answer:
            for piece in answer.iter_text():
                started.set()
                found.append(piece)

    thread = threading.Thread(target=main)
    thread.start()
    assert started.wait(10)
    return thread


@pytest.mark.seconds
def test_at_sigterm_streams_finish_and_no_more_are_taken(
    made: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "multilora")
    texts: list[list[str]] = [[] for _ in range(8)]
    with loopback(made()) as server:
        url = server.url
        threads = [read(server.url, text) for text in texts]
        assert httpx.get(f"{server.url}/health").status_code == 200
        server.handle_exit(signal.SIGTERM, None)
        deadline = time.monotonic() + 5
        while httpx.get(f"{server.url}/health").status_code == 200:
            assert time.monotonic() < deadline
        refused = httpx.post(f"{server.url}/v1/completions", json=BODY)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "10")
        for thread in threads:
            thread.join(30)
        while not server.should_exit:
            time.sleep(0.01)
    assert f"at {url}" in caplog.text
    for text in texts:
        whole = "".join(text)
        assert whole.endswith("data: [DONE]\n\n")
        assert '"finish_reason":"length"' in whole
        assert "error" not in whole


@pytest.mark.seconds
def test_streams_that_take_too_long_are_told_so(made: Any) -> None:
    found: list[str] = []
    with loopback(made(drain_seconds=0)) as server:
        thread = read(server.url, found)
        server.handle_exit(signal.SIGTERM, None)
        thread.join(30)
    whole = "".join(found)
    assert '"code":"draining"' in whole
    assert whole.endswith("data: [DONE]\n\n")


def test_a_second_signal_ends_it_at_once(made: Any) -> None:
    server = made()
    server.handle_exit(signal.SIGINT, None)
    assert not server.should_exit
    server.handle_exit(signal.SIGINT, None)
    assert server.should_exit


def test_a_header_that_is_too_large_is_refused(server: Server) -> None:
    try:
        status = httpx.get(f"{server.url}/health", headers={"x": "a" * (1 << 17)}).status_code
    except httpx.TransportError:  # it was closed before the client had sent all
        status = 400
    assert status == 400
    assert httpx.get(f"{server.url}/health").status_code == 200


def test_where_it_listens_beyond_the_machine_it_says_so(
    made: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with loopback(made(host="0.0.0.0")):
        pass
    assert "asks for no API key" in caplog.text


def test_an_address_that_is_taken_is_an_error_before_a_model_is_loaded() -> None:
    with bound_socket(ServerSettings(port=0)) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port}"):
            bound_socket(ServerSettings(port=port))
    with pytest.raises(ConfigError, match="cannot be listened on"):
        bound_socket(ServerSettings(host="no.such.host.invalid"))
