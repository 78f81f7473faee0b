"""A web server that gives files, and one that does not."""

from __future__ import annotations

import io
import time
from typing import TYPE_CHECKING

import pytest

from multilora.adapters.sources.remote import Interrupted, TooLong
from multilora.adapters.sources.web import Web, download
from multilora.errors import AdapterInvalid
from tests.harness.adapter_servers import Server, cut, redirect, reset, serving, stall, status

if TYPE_CHECKING:
    from tests.harness.adapter_servers import Answer, Handler

DATA = bytes(range(256)) * 300


def fetch(server: Server, *, max_bytes: int = 1 << 20, may_go: bool = False) -> bytes:
    file = io.BytesIO()
    web = Web(f"{server.url}/a", ("x",), lambda url: may_go)
    assert web.fetch("x", file, max_bytes, time.monotonic() + 60)
    return file.getvalue()


def test_a_file_comes_as_it_is(server: Server) -> None:
    server.files["/a/x"] = DATA
    assert fetch(server) == DATA
    file = io.BytesIO()
    assert not Web(f"{server.url}/a", (), bool).fetch("y", file, 9, time.monotonic() + 60)


def test_the_version_is_that_of_all_files(server: Server) -> None:
    web = Web(f"{server.url}/a", ("x", "y"), bool)
    assert web.version() is None
    server.files["/a/x"] = DATA
    first = web.version()
    assert first is not None
    assert web.version() == first
    server.files["/a/y"] = b"y"
    assert web.version() not in (None, first)

    def untagged(handler: Handler) -> None:
        handler.send_response(200)
        handler.end_headers()

    server.answers["/a/x"] = [untagged]
    assert web.version() is None


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (stall(DATA), "x broke off: .*timed out"),
        (cut(DATA), "x broke off: 38400 of 76800 bytes came"),
        (reset(DATA), "x broke off"),
        (status(503), "answers 503"),
        (status(429), "answers 429"),
    ],
)
def test_what_breaks_off_may_be_tried_again(server: Server, answer: Answer, words: str) -> None:
    server.answers["/a/x"] = [answer]
    begin = time.monotonic()
    with pytest.raises(Interrupted, match=words):
        fetch(server)
    assert time.monotonic() - begin < 5


def test_who_does_not_listen_may_later() -> None:
    with serving() as server:
        pass
    with pytest.raises(Interrupted, match="refused"):
        fetch(server)


@pytest.mark.parametrize("code", [401, 403, 400])
def test_what_the_server_refuses_is_not_tried_again(server: Server, code: int) -> None:
    server.answers["/a/x"] = [status(code)]
    with pytest.raises(AdapterInvalid, match=f"answers {code}"):
        fetch(server)


def test_what_is_too_long_is_not_read(server: Server) -> None:
    server.files["/a/x"] = DATA
    with pytest.raises(TooLong, match="x has 76800 bytes, more than 100"):
        fetch(server, max_bytes=100)

    def without_length(handler: Handler) -> None:
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(DATA)

    server.answers["/a/x"] = [without_length]
    assert fetch(server) == DATA
    with pytest.raises(TooLong):
        fetch(server, max_bytes=100)
    server.answers["/a/x"] = [lambda handler: handler.give(DATA, Content_Encoding="gzip")]
    with pytest.raises(AdapterInvalid, match="compressed"):
        fetch(server)


def test_a_longer_body_than_was_said_is_cut(server: Server) -> None:
    server.answers["/a/x"] = [lambda handler: handler.give(DATA, length=100)]
    assert fetch(server) == DATA[:100]  # as HTTP has it; the adapter's reader refuses half a file


def test_it_goes_on_to_where_it_may_alone_and_takes_no_token_along(server: Server) -> None:
    with serving() as other:
        other.files["/y"] = DATA
        server.answers["/a/x"] = [redirect(f"{other.url}/y")]
        with pytest.raises(AdapterInvalid, match=r"leads on to .*which adapter_sources does not"):
            fetch(server)
        assert other.asked == []
        assert fetch(server, may_go=True) == DATA
        for url in ("file:///etc/passwd", "ftp://127.0.0.1/x"):
            server.answers["/a/x"] = [redirect(url)]
            with pytest.raises(AdapterInvalid):
                fetch(server)
        server.answers["/a/x"] = [redirect(f"{other.url}/y")]
        headers = {"Authorization": "Bearer secret"}
        for url in (f"{server.url}/a/x", f"{other.url}/y"):
            assert download(
                url, io.BytesIO(), "x", 1 << 20, time.monotonic() + 60, lambda url: True, headers
            )
        assert server.tokens[-1] == "Bearer secret"
        assert other.tokens[-2:] == [None, "Bearer secret"]
        server.answers["/a/x"] = [redirect(f"{server.url}/a/x")]
        with pytest.raises((AdapterInvalid, Interrupted), match="302"):
            fetch(server, may_go=True)  # in a circle
