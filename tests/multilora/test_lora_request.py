"""An adapter as vLLM's users name it; `LLM` is tested with it in entrypoints/test_llm.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from multilora.errors import RequestError
from multilora.lora_request import LoRARequest


def test_positional_as_in_vllm() -> None:
    request = LoRARequest("sql", 1, "/adapters/sql")
    assert (request.name, request.lora_int_id, request.path) == ("sql", 1, "/adapters/sql")
    assert request == LoRARequest("sql", 1, Path("/adapters/sql"))  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [("", 1, "x"), (None, 1, "x"), ("a", 1, ""), ("a", 1, None)])
def test_a_name_and_a_folder_are_needed(wrong: tuple[Any, ...]) -> None:
    with pytest.raises(RequestError, match="must be"):
        LoRARequest(*wrong)
