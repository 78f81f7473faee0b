"""Statuses and bodies of errors."""

from __future__ import annotations

import pytest

from multilora import errors
from multilora.server.errors import HttpError, http_error, internal


@pytest.mark.parametrize(
    ("error", "status", "code", "retry"),
    [
        (errors.RequestError("x"), 400, None, None),
        (errors.TokenizerError("x"), 400, None, None),
        (errors.CapacityError("x"), 400, "context_length_exceeded", None),
        (errors.AdapterNotFound("x"), 404, "model_not_found", None),
        (errors.EngineFullError("x"), 429, "rate_limit_exceeded", "1"),
        (errors.EngineClosedError("x"), 503, "draining", "10"),
        (errors.EngineDeadError("x"), 503, "engine_dead", None),
        (errors.AdapterInvalid("x"), 500, "internal_error", None),
        (ValueError("x"), 500, "internal_error", None),
        (HttpError(418, "x", code="tea"), 418, "tea", None),
    ],
)
def test_an_error_has_its_status(
    error: Exception, status: int, code: str | None, retry: str | None
) -> None:
    found = http_error(error)
    assert (found.status, found.code, found.headers.get("Retry-After")) == (status, code, retry)
    assert found.body()["error"].keys() == {"message", "type", "param", "code"}


def test_what_is_ours_tells_nothing_of_the_inside() -> None:
    secret = "/home/me/adapters at 0x7f00"
    for error in (errors.AdapterInvalid(secret), errors.EngineDeadError(secret), OSError(secret)):
        assert secret not in str(http_error(error))
    assert str(internal("it failed")) == "it failed; the server's log says why"
