"""The examples do what they say, and are as short as they say."""

from __future__ import annotations

import asyncio
import runpy
import shutil
import time
from typing import TYPE_CHECKING, Any

import pytest

from multilora import Engine, EngineConfig, SamplingParams
from tests.harness.paths import ROOT, UMA
from tests.harness.streams import is_clean

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

EXPERTS = ("feedback", "job-analysis", "profile-review", "proposal")
NAMES = [f"{expert}-{i}" for i in range(2) for expert in EXPERTS]
PROMPTS = [f"We need a developer for {what}" for what in ("a shop", "a game")]
EMBED = ROOT / "examples" / "embed_fastapi.py"


@pytest.fixture
def app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The app of examples/embed_fastapi.py over the demo's model, with eight adapters."""
    pytest.importorskip("fastapi")
    for name in NAMES:
        shutil.copytree(UMA / "adapters" / name.rpartition("-")[0], tmp_path / name)
    monkeypatch.setenv("BASE", str(UMA / "base"))
    monkeypatch.setenv("ADAPTERS", str(tmp_path))
    return runpy.run_path(str(EMBED))["app"]


@pytest.fixture(scope="module")
def expected() -> Iterator[dict[tuple[str, str | None], str]]:
    """What the step-wise engine answers, one request after the other."""
    engine, found = Engine(EngineConfig(model=str(UMA / "base"))), {}
    for expert in EXPERTS:
        engine.load_adapter(expert, UMA / "adapters" / expert)
    params = SamplingParams(max_tokens=64, temperature=0)
    for prompt in PROMPTS:
        for expert in (*EXPERTS, None):
            engine.add_request(prompt, params, adapter=expert)
            while engine.has_work:
                for output in engine.step():
                    found[prompt, expert] = output.outputs[0].text
    return found


def test_a_server_of_ones_own_takes_less_than_thirty_lines() -> None:
    lines = [line for line in EMBED.read_text(encoding="utf-8").splitlines() if line.strip()]
    assert len(lines) < 30


@pytest.mark.seconds
def test_it_serves_sixteen_streams_over_eight_adapters(
    app: Any, expected: dict[tuple[str, str | None], str]
) -> None:
    httpx = pytest.importorskip("httpx")

    async def main() -> None:
        transport = httpx.ASGITransport(app)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://here") as client,
        ):

            async def ask(prompt: str, name: str | None) -> None:
                found = await client.post("/generate", json={"prompt": prompt, "adapter": name})
                assert found.status_code == 200
                expert = None if name is None else name.rpartition("-")[0]
                assert found.text == expected[prompt, expert]

            await asyncio.gather(*(ask(p, name) for p in PROMPTS for name in NAMES))
            await ask(PROMPTS[0], None)
            wrong = await client.post("/generate", json={"prompt": "x", "adapter": "nobody"})
            assert (wrong.status_code, "nobody" in wrong.text) == (400, True)
            await is_clean(app.state.engine)

    asyncio.run(main())


def test_its_client_that_goes_ends_the_request(app: Any) -> None:
    """By the protocol between server and app: the client is gone after the first piece."""

    def slowly(inner: Engine) -> None:
        step = inner.step
        inner.step = lambda: (time.sleep(0.01), step())[1]  # type: ignore[method-assign]

    body = b'{"prompt": "We need a developer", "adapter": "proposal-0"}'
    sent: list[Any] = []

    async def main() -> None:
        gone, inbox = asyncio.Event(), [{"type": "http.request", "body": body}]

        async def receive() -> Any:
            if inbox:
                return inbox.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)
            if message["type"] == "http.response.body":
                gone.set()

        scope = {
            "type": "http",
            "method": "POST",
            "path": "/generate",
            "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
        }
        async with app.router.lifespan_context(app):
            engine = app.state.engine
            await engine.call(slowly)
            await app(scope, receive, send)
            assert await engine.drain(10)
            stats = await engine.get_stats()
            assert 0 < stats.generated_tokens < 40
            await is_clean(engine)

    asyncio.run(main())
    assert sent[0]["status"] == 200
