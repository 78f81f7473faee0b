"""Adapters that come and go over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from multilora.server.settings import ServerSettings
from tests.harness.paths import UMA

from .conftest import NAMES, Ask, Stepwise

ADMIN = ServerSettings(served_model_name=("uma",), enable_lora_admin=True)
FOLDER = str(UMA / "adapters" / "feedback")
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


def test_it_is_off_unless_asked_for(ask: Ask) -> None:
    for path in (LOAD, UNLOAD):
        body = {"lora_name": "new", "lora_path": FOLDER}
        assert ask("POST", path, NAMES, json=body).status_code == 404


def test_an_adapter_comes_answers_and_goes(ask: Ask, stepwise: Stepwise) -> None:
    body: dict[str, Any] = {"lora_name": "team/new", "lora_path": FOLDER}
    asked = {"model": "team/new", "prompt": "Hello", "max_tokens": 5, "temperature": 0}
    found = ask("POST", LOAD, ADMIN, json=body)
    assert (found.status_code, "team/new" in found.text) == (200, True)
    answer = ask("POST", "/v1/completions", ADMIN, json=asked).json()["choices"][0]
    expected = stepwise.answer("Hello", "feedback", max_tokens=5, temperature=0)
    assert answer["text"] == expected.outputs[0].text
    again = ask("POST", LOAD, ADMIN, json=body)
    assert (again.status_code, "load_inplace" in again.text) == (400, True)
    assert ask("POST", LOAD, ADMIN, json={**body, "load_inplace": True}).status_code == 200
    assert ask("POST", UNLOAD, ADMIN, json={"lora_name": "team/new"}).status_code == 200
    assert ask("POST", UNLOAD, ADMIN, json={"lora_name": "team/new"}).status_code == 404
    assert ask("POST", "/v1/completions", ADMIN, json=asked).status_code == 404


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lora_name": "uma"}, "base"),
        ({"lora_name": "../x"}, "not allowed"),
        ({"lora_name": "n\x00"}, "not allowed"),
        ({"lora_path": "/no/such/folder"}, "/no/such/folder"),
        ({"lora_path": "/proc/self/environ"}, "environ"),
        ({"lora_path": "a\x00b"}, ""),
        ({"lora_path": 5}, "lora_path"),
        ({"pinned": True}, "pinned"),
    ],
)
def test_what_cannot_be_loaded_is_an_error(ask: Ask, change: dict[str, Any], words: str) -> None:
    body = {"lora_name": "new", "lora_path": FOLDER, **change}
    found = ask("POST", LOAD, ADMIN, json=body)
    assert (found.status_code, words in found.json()["error"]["message"]) == (400, True)
    assert "new" not in [card["id"] for card in ask("GET", "/v1/models").json()["data"]]


def test_a_broken_folder_says_what_is_wrong(ask: Ask, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{")
    found = ask("POST", LOAD, ADMIN, json={"lora_name": "new", "lora_path": str(tmp_path)})
    assert (found.status_code, found.json()["error"]["param"]) == (400, "lora_path")
