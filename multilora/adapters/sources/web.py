"""Files of a web server: bounded in size and time, redirected to where one may go alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from http.client import HTTPException, HTTPResponse
from typing import Any, BinaryIO
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from ...errors import AdapterInvalid, shown
from . import remote
from .remote import Interrupted, TooLong, write_all

MISSING = (404, 410)
PASSING = (408, 425, 429)  # and 500 and above: another attempt may succeed
PIECE = 1 << 20


class Web:
    """A folder of a web server."""

    def __init__(self, url: str, names: tuple[str, ...], may_go: Callable[[str], bool]) -> None:
        self._url, self._names, self._may_go = url, names, may_go

    def version(self) -> str | None:
        """The ETags of the files of these names; None if one has none."""
        tags = {}
        for name in self._names:
            response = _open(f"{self._url}/{name}", {}, self._may_go, "HEAD")
            if response is not None:
                with response:
                    tags[name] = response.headers.get("ETag")
        return json.dumps(tags) if tags and all(tags.values()) else None

    def fetch(self, name: str, file: BinaryIO, max_bytes: int, until: float) -> bool:
        """As `Remote.fetch`."""
        return download(f"{self._url}/{name}", file, name, max_bytes, until, self._may_go)


def download(
    url: str,
    file: BinaryIO,
    name: str,
    max_bytes: int,
    until: float,
    may_go: Callable[[str], bool],  # to another URL
    headers: Mapping[str, str] | None = None,
) -> bool:
    """Writes what lies at the URL to `file`; False where nothing does."""
    response = _open(url, headers or {}, may_go)
    if response is None:
        return False
    with response:
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise AdapterInvalid(f"{name} comes compressed, though it was asked for as it is")
        length = response.headers.get("Content-Length", "")
        if length.isdecimal() and int(length) > max_bytes:
            raise TooLong(f"{name} has {length} bytes, more than {max_bytes}")
        count = write_all(_pieces(response, name), file, name, max_bytes, until)
    if length.isdecimal() and count != int(length):
        raise Interrupted(f"{name} broke off: {count} of {length} bytes came")
    return True


def _pieces(response: HTTPResponse, name: str) -> Iterator[bytes]:
    try:
        while piece := response.read1(PIECE):  # what one receive gave: a slow sender is noticed
            yield piece
    except (OSError, HTTPException) as error:
        raise Interrupted(f"{name} broke off: {error or type(error).__name__}") from error


def _open(
    url: str, headers: Mapping[str, str], may_go: Callable[[str], bool], method: str = "GET"
) -> HTTPResponse | None:
    """The answer to a request; None where nothing lies."""
    request = Request(url, headers={"Accept-Encoding": "identity", **headers}, method=method)
    try:
        response: HTTPResponse = build_opener(_Redirects(may_go)).open(
            request, timeout=remote.READ_SECONDS
        )
    except HTTPError as error:
        with error:
            if error.code in MISSING:
                return None
            if error.code in PASSING or error.code >= 500:
                raise Interrupted(f"{url} answers {error.code} {error.reason}") from error
            raise AdapterInvalid(f"{url} answers {error.code} {error.reason}") from error
    except (OSError, HTTPException) as error:
        raise Interrupted(f"{url}: {error or type(error).__name__}") from error
    return response


class _Redirects(HTTPRedirectHandler):
    """Follows to where it may, and tells another host no secrets."""

    def __init__(self, may_go: Callable[[str], bool]) -> None:
        self._may_go = may_go

    def redirect_request(
        self, req: Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> Request | None:
        if not self._may_go(newurl):
            raise AdapterInvalid(
                f"{req.full_url} leads on to {shown(newurl.partition('?')[0])}, which "
                "adapter_sources does not allow; add that place, or give the source there"
            )
        new = super().redirect_request(req, fp, code, msg, headers, newurl)
        if new is not None:
            new.method = req.get_method()
            if urlsplit(newurl)[:2] != urlsplit(req.full_url)[:2]:
                new.remove_header("Authorization")
        return new
