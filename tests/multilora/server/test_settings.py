"""Settings that are wrong are refused before anything is loaded."""

from __future__ import annotations

from typing import Any

import pytest

from multilora.errors import ConfigError
from multilora.server.settings import ServerSettings

KEY = "a-data-key"


def test_by_default_it_is_this_machines_alone() -> None:
    settings = ServerSettings()
    assert (settings.host, settings.enable_lora_admin) == ("127.0.0.1", False)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"port": 70000}, "port"),
        ({"port": True}, "port"),
        ({"max_body_bytes": 0}, "max_body_bytes"),
        ({"max_prompts": 0}, "max_prompts"),
        ({"drain_seconds": -1}, "drain_seconds"),
        ({"drain_seconds": float("nan")}, "drain_seconds"),
        ({"drain_seconds": float("inf")}, "drain_seconds"),
        ({"host": ""}, "host"),
        ({"api_keys": ("short",)}, "8 or more"),
        ({"api_keys": ("with a space",)}, "8 or more"),
        ({"api_keys": (KEY,), "admin_keys": (KEY,), "enable_lora_admin": True}, "use two"),
        ({"admin_keys": (KEY,)}, "enable_lora_admin"),
        ({"api_keys": (KEY,), "enable_lora_admin": True}, "admin key"),
        ({"host": "0.0.0.0", "enable_lora_admin": True}, "admin key"),
    ],
)
def test_what_is_wrong_is_named(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as found:
        ServerSettings(**given)
    assert KEY not in str(found.value)
