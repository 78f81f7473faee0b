"""Who comes in, with how much: keys and the size of a body, before anything reads it."""

from __future__ import annotations

import hashlib
import hmac
from typing import TYPE_CHECKING

from .errors import HttpError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from .settings import ServerSettings

OPEN = frozenset({"/health", "/ping"})  # a load balancer has no key
ADMIN = frozenset({"/v1/load_lora_adapter", "/v1/unload_lora_adapter"})


class Guard:
    """ASGI middleware around every path, those that do not exist among them."""

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self.app, self._max_bytes = app, settings.max_body_bytes
        self._data, self._admin = _digests(settings.api_keys), _digests(settings.admin_keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Lets a request through, or answers it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            self._check_key(scope)
            body = await self._body(scope, receive)
        except HttpError as error:
            await error.response()(scope, receive, send)
            return
        if body is None:  # the client has gone
            return
        first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def again() -> Message:
            return first.pop() if first else await receive()

        await self.app(scope, again, send)

    def _check_key(self, scope: Scope) -> None:
        path = scope["path"].removeprefix(scope.get("root_path", ""))  # also where it is mounted
        allowed = self._admin if path in ADMIN else self._data
        if not allowed or path in OPEN:
            return
        key = _bearer(scope["headers"])
        if key is None:
            raise _unauthorised("no API key was given: send `Authorization: Bearer KEY`")
        if _is_one_of(key, allowed):
            return
        if path in ADMIN and _is_one_of(key, self._data):
            raise HttpError(
                403, "this key may not exchange adapters; send the admin key", code="forbidden"
            )
        raise _unauthorised("the API key is wrong")

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        """All of it, or None if the client goes before its end."""
        for name, value in scope["headers"]:
            if name == b"content-length" and value.isdigit() and len(value) < 20:
                self._check_size(int(value))
        parts, size = [], 0
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return None
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            self._check_size(size)
            if not message.get("more_body", False):
                return b"".join(parts)

    def _check_size(self, size: int) -> None:
        if size > self._max_bytes:
            raise HttpError(
                413, f"the body is larger than {self._max_bytes} bytes", code="body_too_large"
            )


def _digests(keys: Iterable[str]) -> tuple[bytes, ...]:
    return tuple(hashlib.sha256(key.encode()).digest() for key in keys)


def _is_one_of(key: bytes, digests: tuple[bytes, ...]) -> bool:
    """Takes as long for any key: digests of one length are compared, and all of them."""
    own = hashlib.sha256(key).digest()
    return sum(hmac.compare_digest(own, digest) for digest in digests) > 0


def _bearer(headers: Iterable[tuple[bytes, bytes]]) -> bytes | None:
    given = [value for name, value in headers if name == b"authorization"]
    kind, _, key = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
    return key.strip() if kind.lower() == b"bearer" and key.strip() else None


def _unauthorised(why: str) -> HttpError:
    error = HttpError(401, why, code="invalid_api_key")
    error.headers = {"WWW-Authenticate": "Bearer"}
    return error
