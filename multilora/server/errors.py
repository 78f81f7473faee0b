"""What went wrong, as OpenAI's clients expect it: a status and a body of the known form."""

from __future__ import annotations

import logging
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from ..errors import (
    AdapterNotFound,
    CapacityError,
    EngineClosedError,
    EngineDeadError,
    EngineFullError,
    MultiloraError,
    RequestError,
    TokenizerError,
)

logger = logging.getLogger(__name__)

INVALID, UNAVAILABLE, INTERNAL = "invalid_request_error", "service_unavailable", "server_error"
FULL_SECONDS, DRAIN_SECONDS = 1, 10  # after which to try again


class HttpError(Exception):
    """An answer that is an error. Its text is for the client: nothing of the inside is in it."""

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = INVALID,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.kind, self.param, self.code = status, kind, param, code
        self.headers = {} if retry_after is None else {"Retry-After": str(retry_after)}

    def body(self) -> dict[str, Any]:
        """As OpenAI has it."""
        error = {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self) -> JSONResponse:
        """The whole answer."""
        return JSONResponse(self.body(), self.status, self.headers)


def model_not_found(error: AdapterNotFound | str) -> HttpError:
    """The same for a name that nobody has, however it was asked for."""
    return HttpError(404, str(error), param="model", code="model_not_found")


def internal(what: str) -> HttpError:
    """The text says where to look, not what it was: that may hold paths and more."""
    return HttpError(500, f"{what}; the server's log says why", INTERNAL, code="internal_error")


def http_error(error: Exception) -> HttpError:
    """What an error of the engine's is to a client. What is nobody's fault but ours is logged."""
    if isinstance(error, HttpError):
        return error
    if isinstance(error, AdapterNotFound):
        return model_not_found(error)
    if isinstance(error, CapacityError):
        return HttpError(400, str(error), code="context_length_exceeded")
    if isinstance(error, RequestError | TokenizerError):
        return HttpError(400, str(error))
    if isinstance(error, EngineFullError):
        return HttpError(
            429,
            str(error),
            "rate_limit_error",
            code="rate_limit_exceeded",
            retry_after=FULL_SECONDS,
        )
    if isinstance(error, EngineClosedError):
        return HttpError(503, str(error), UNAVAILABLE, code="draining", retry_after=DRAIN_SECONDS)
    if isinstance(error, EngineDeadError):
        logger.error("the engine is dead: %s", error)
        return HttpError(503, "the engine has ended", UNAVAILABLE, code="engine_dead")
    logger.error("a request failed", exc_info=error)
    return internal("the request failed")


def _invalid(error: RequestValidationError) -> HttpError:
    """Names the first field that is wrong."""
    first = error.errors()[0]
    context = first.get("ctx") or {}
    place = [str(part) for part in first["loc"] if part != "body"]
    if first["type"] == "json_invalid":
        return HttpError(400, f"the body is no JSON: {context.get('error', first['msg'])}")
    if first["type"] == "unsupported_field":
        return HttpError(400, first["msg"], param=context["field"])
    if not place:
        return HttpError(400, "the body must be a JSON object, sent as application/json")
    return HttpError(400, f"{'.'.join(place)[:100]}: {first['msg']}", param=place[0][:100])


async def answer_error(request: Request, error: Exception) -> JSONResponse:
    """The handler of every exception."""
    if isinstance(error, RequestValidationError):
        return _invalid(error).response()
    if isinstance(error, HTTPException):  # of the router: no such path, or not by this method
        why = HttpError(error.status_code, f"{request.method} of this path: {error.detail}")
        why.headers = dict(error.headers or {})
        return why.response()
    return http_error(error).response()


HANDLED = (MultiloraError, HttpError, RequestValidationError, HTTPException, Exception)
