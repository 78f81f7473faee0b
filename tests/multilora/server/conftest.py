"""What the tests of the server share: the demo's model behind apps, and a server on loopback."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from multilora import AsyncEngine, Engine, EngineConfig, SamplingParams
from multilora.outputs import RequestOutput
from multilora.server.app import create_app
from multilora.server.run import Server
from multilora.server.settings import ServerSettings
from tests.harness.paths import UMA

ADAPTERS = ("feedback", "job-analysis", "proposal")
SETTINGS: dict[str, Any] = {"model": str(UMA / "base"), "max_model_len": 256, "max_num_seqs": 16}
NAMES = ServerSettings(port=0, served_model_name=("uma", "gpt"))


@contextmanager
def loopback(server: Server) -> Iterator[Server]:
    """Runs a server on a thread of its own, and ends it."""
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    while not server.started and thread.is_alive():
        thread.join(0.01)
    assert server.started
    try:
        yield server
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def engine() -> Iterator[AsyncEngine]:
    """With the demo's adapters, the last of them read on demand."""
    found = AsyncEngine(EngineConfig(**SETTINGS))

    async def load() -> None:
        for name in ADAPTERS[:-1]:
            await found.load_adapter(name, UMA / "adapters" / name)
        await found.register_adapter(ADAPTERS[-1], UMA / "adapters" / ADAPTERS[-1])

    asyncio.run(load())
    yield found
    asyncio.run(found.shutdown())


@pytest.fixture(scope="session")
def server(engine: AsyncEngine) -> Iterator[Server]:
    with loopback(Server(engine, NAMES)) as found:
        yield found


@dataclass
class Stepwise:
    """The engine that is stepped by hand, one request after the other: the oracle."""

    engine: Engine

    def answer(self, prompt: Any, adapter: Any = None, **fields: Any) -> RequestOutput:
        self.engine.add_request(prompt, SamplingParams(**fields), adapter=adapter)
        output = None
        while self.engine.has_work:
            output = (self.engine.step() or [output])[-1]
        assert output is not None
        assert output.finished
        return output

    def chat(self, content: str) -> list[int]:
        """The ids of a user's message."""
        assert self.engine.tokenizer is not None
        return self.engine.tokenizer.apply_chat_template([{"role": "user", "content": content}])


@pytest.fixture(scope="session")
def stepwise() -> Stepwise:
    engine = Engine(EngineConfig(**SETTINGS))
    for name in ADAPTERS:
        engine.load_adapter(name, UMA / "adapters" / name)
    return Stepwise(engine)


Ask = Callable[..., httpx.Response]


@pytest.fixture
def ask(engine: AsyncEngine) -> Ask:
    """Sends one request to an app over the engine: ask("POST", path, settings=..., json=...)."""

    def send(
        method: str, path: str, settings: ServerSettings = NAMES, **request: Any
    ) -> httpx.Response:
        async def main() -> httpx.Response:
            transport = httpx.ASGITransport(create_app(engine, settings), False)
            async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
                return await client.request(method, path, **request)

        return asyncio.run(main())

    return send
