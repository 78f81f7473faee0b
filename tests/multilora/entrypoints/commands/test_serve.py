"""`multilora serve`: its options, and a whole life as a process of its own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from typing import Any

import pytest

from multilora.entrypoints.commands.serve import parse_modules, server_settings
from multilora.errors import ConfigError
from tests.harness.paths import UMA

httpx = pytest.importorskip("httpx")

GIVEN: dict[str, Any] = {
    "host": "127.0.0.1",
    "port": 0,
    "enable_lora_admin": False,
    "max_body_bytes": 1000,
    "drain_seconds": 5.0,
}


def test_modules_are_names_with_folders_or_json() -> None:
    given = ["a=x/y=z", '{"name": "b", "path": "p", "base_model_name": "m"}']
    assert parse_modules(given) == {"a": "x/y=z", "b": "p"}


@pytest.mark.parametrize(
    "given",
    ["a", "=x", "a=", "{", "[]", '{"name": "a"}', '{"name": 1, "path": "p"}', '{"x": 1}'],
)
def test_other_modules_are_refused(given: str) -> None:
    with pytest.raises(ConfigError, match="--lora-modules"):
        parse_modules([given])
    with pytest.raises(ConfigError, match="twice"):
        parse_modules(["a=x", "a=y"])


def test_keys_come_from_options_and_the_environment() -> None:
    given = {**GIVEN, "api_key": ["option-key"], "enable_lora_admin": True}
    found = server_settings(given, "environment-key", "admin-key")
    assert found.api_keys == ("option-key", "environment-key")
    assert found.admin_keys == ("admin-key",)
    assert server_settings(GIVEN, None, "").api_keys == ()


@pytest.mark.seconds
def test_a_server_starts_answers_and_ends_with_status_0() -> None:
    program = "from multilora.entrypoints.cli import main; main()"
    adapters = [f"{name}={UMA / 'adapters' / name}" for name in ("feedback", "proposal")]
    command = [
        *(sys.executable, "-c", program, "serve", str(UMA / "base"), "--port", "0"),
        *("--served-model-name", "uma", "--max-model-len", "128", "--enable-lora"),
        *("--lora-modules", *adapters),
    ]
    environment = {**os.environ, "MULTILORA_API_KEY": "secret-key"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stderr is not None
            lines = []
            for line in process.stderr:
                lines.append(line)
                if url := re.search(r"serves uma with 2 adapters at (http://\S+):", line):
                    break
            else:
                pytest.fail("".join(lines))
            headers = {"Authorization": "Bearer secret-key"}
            body = {"model": "proposal", "prompt": "Hello", "max_tokens": 3}
            path = f"{url[1]}/v1/completions"
            assert httpx.post(path, json=body).status_code == 401
            assert httpx.post(path, json=body, headers=headers).status_code == 200
            process.send_signal(signal.SIGTERM)
            rest = process.stderr.read()
            assert process.wait(30) == 0, rest
            assert "Traceback" not in rest
        finally:
            process.kill()
