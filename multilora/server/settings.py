"""How the server listens, whom it lets in, and how much it takes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..adapters.mix import check_name
from ..arguments import is_int, is_number
from ..errors import AdapterError, ConfigError, shown

LOOPBACK = ("127.0.0.1", "::1", "localhost")  # hosts that only this machine reaches
MIN_KEY = 8  # characters: a shorter one is found by trying


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """Everything about the server that is not the engine's. A ConfigError for what is wrong.

    Attributes:
        host: Address to listen on; only this machine by default.
        port: 0 = any that is free, which the log tells.
        served_model_name: Names of the base in requests, the first one in answers. Empty = the
            model as it was given.
        api_keys: Any of them opens all but `/health` and `/ping`. Empty = everyone may come in.
        admin_keys: Any of them, and no other key, opens the loading of adapters.
        enable_lora_admin: Whether adapters can be loaded and unloaded over HTTP.
        max_body_bytes: Largest body of a request.
        max_prompts: Most prompts in one request.
        drain_seconds: For how long, after SIGTERM, requests may go on.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    served_model_name: tuple[str, ...] = ()
    api_keys: tuple[str, ...] = ()
    admin_keys: tuple[str, ...] = ()
    enable_lora_admin: bool = False
    max_body_bytes: int = 4 << 20
    max_prompts: int = 128
    drain_seconds: float = 30.0

    def __post_init__(self) -> None:
        for name, low, high in (
            ("port", 0, 65535),
            ("max_body_bytes", 1, 2**40),
            ("max_prompts", 1, 2**16),
        ):
            value = getattr(self, name)
            if not is_int(value) or not low <= value <= high:
                raise ConfigError(
                    f"{name} must be an integer from {low} to {high}, not {shown(value)}"
                )
        seconds = self.drain_seconds
        if not is_number(seconds) or not (0 <= seconds < math.inf):
            raise ConfigError(f"drain_seconds must be seconds, 0 or more, not {shown(seconds)}")
        if not self.host:
            raise ConfigError("host is empty; give 127.0.0.1, or 0.0.0.0 for all networks")
        self._check_names()
        self._check_keys()

    def _check_names(self) -> None:
        for name in self.served_model_name:
            try:
                check_name(name)
            except AdapterError as error:
                raise ConfigError(f"served_model_name: {error}".replace("adapter ", "")) from None

    def _check_keys(self) -> None:
        for key in (*self.api_keys, *self.admin_keys):
            if len(key) < MIN_KEY or not key.isascii() or not key.isprintable() or " " in key:
                raise ConfigError(
                    f"an API key must have {MIN_KEY} or more printable ASCII characters and no "
                    "space, and one of those given has not"
                )
        if set(self.api_keys) & set(self.admin_keys):
            raise ConfigError("one key is given for data and for administration; use two")
        if self.admin_keys and not self.enable_lora_admin:
            raise ConfigError("an admin key opens nothing without enable_lora_admin")
        is_open = not self.api_keys and self.host in LOOPBACK
        if self.enable_lora_admin and not self.admin_keys and not is_open:
            raise ConfigError(
                "enable_lora_admin needs an admin key: without, anyone who may ask the models, or "
                "reaches the machine, could exchange them"
            )
