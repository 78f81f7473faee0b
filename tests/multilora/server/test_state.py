"""What a request's `model` means."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from multilora import AsyncEngine, EngineConfig
from multilora.errors import AdapterNotFound, RequestError
from multilora.server.errors import HttpError
from multilora.server.settings import ServerSettings
from multilora.server.state import ServerState
from tests.harness.paths import UMA

from .conftest import NAMES, SETTINGS


def run(made: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(made)


@pytest.fixture
def state(engine: AsyncEngine) -> ServerState:
    return ServerState(engine, NAMES)


@pytest.mark.parametrize(
    ("model", "weights", "spec"),
    [
        (None, None, None),
        ("gpt", None, None),
        ("uma", {"feedback": 0.5, "x": 1.0}, {"feedback": 0.5, "x": 1.0}),
        ("feedback", None, "feedback"),
        ("gpt:feedback", None, "feedback"),
        ("other:feedback", None, "other:feedback"),
        ("", None, ""),
    ],
)
def test_a_model_is_the_base_or_adapters(
    state: ServerState, model: str | None, weights: Any, spec: Any
) -> None:
    assert run(state.adapter(model, weights)) == spec


def test_an_adapter_whose_name_looks_like_base_and_adapter_comes_first(
    engine: AsyncEngine, state: ServerState
) -> None:
    async def main() -> None:
        await engine.register_adapter("uma:feedback", UMA / "adapters" / "proposal")
        try:
            assert await state.adapter("uma:feedback", None) == "uma:feedback"
        finally:
            await engine.unload_adapter("uma:feedback")

    run(main())


def test_names_that_are_none_of_ours_are_errors(state: ServerState) -> None:
    for model in (None, "uma", "gpt:feedback", "proposal"):
        run(state.check_model(model))
    with pytest.raises(HttpError, match="nobody") as found:
        run(state.check_model("nobody"))
    assert found.value.status == 404
    digest = run(state.engine.list_adapters())["feedback"].digest
    run(state.check_model(f"uma:feedback@{digest[:8]}"))
    for version in ("000000", "x"):
        with pytest.raises(AdapterNotFound):
            run(state.check_model(f"feedback@{version}"))


def test_without_names_the_base_is_called_as_it_was_given(engine: AsyncEngine) -> None:
    assert ServerState(engine, ServerSettings()).served == (SETTINGS["model"],)


def test_variables_of_a_template_are_no_arguments(state: ServerState) -> None:
    for name in ("messages", "max_length", "chat_template", "tokenize"):
        with pytest.raises(RequestError, match=name):
            run(state.chat_prompt([{"role": "user", "content": "a"}], {name: 1}, None))


def test_without_a_tokenizer_ids_are_served_alone() -> None:
    async def main() -> None:
        engine = AsyncEngine(EngineConfig(**SETTINGS, skip_tokenizer_init=True))
        state = ServerState(engine, NAMES)
        with pytest.raises(HttpError, match="token ids"):
            _ = state.tokenizer
        await state.close()

    run(main())
