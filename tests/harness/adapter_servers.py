"""Servers on this machine that give adapters, well and badly: of the web, and a hub."""

from __future__ import annotations

import hashlib
import io
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    Answer = Callable[["Handler"], None]

COMMIT = "c" * 40


class Handler(BaseHTTPRequestHandler):
    """Answers by the server's table, then by its files."""

    server: Server

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.server.asked.append((self.command, path))
        self.server.tokens.append(self.headers.get("Authorization"))
        answers = self.server.answers.get(path)
        if answers:
            answer = answers.pop(0) if len(answers) > 1 else answers[0]
            answer(self)
        elif path in self.server.files:
            self.give(self.server.files[path])
        else:
            self.send_error(404)

    do_HEAD = do_GET

    def give(self, data: bytes, *, length: int | None = None, **headers: str) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(data) if length is None else length))
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        pass


class Server(ThreadingHTTPServer):
    """Files by path, and what is done instead: one answer after the other, the last for ever."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.answers: dict[str, list[Answer]] = {}
        self.asked: list[tuple[str, str]] = []
        self.tokens: list[str | None] = []
        self.ended = threading.Event()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Who asked has gone; what that means is its test's matter."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def put(self, place: str, folder: Path) -> None:
        for file in folder.iterdir():
            self.files[f"/{place}/{file.name}"] = file.read_bytes()

    def put_on_hub(self, repo: str, folder: Path, commit: str = COMMIT) -> None:
        """As the main revision, also by the commit's own name."""
        siblings = []
        for file in sorted(folder.rglob("*")):
            if not file.is_file():
                continue
            name, data = file.relative_to(folder).as_posix(), file.read_bytes()
            self.files[f"/{repo}/resolve/{commit}/{name}"] = data
            sibling: dict[str, Any] = {"rfilename": name, "size": len(data)}
            if name.endswith(".safetensors"):
                sha = hashlib.sha256(data).hexdigest()
                sibling["lfs"] = {"sha256": sha, "size": len(data), "pointerSize": 9}
            blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            siblings.append({**sibling, "blobId": blob})
        info = {"_id": "1", "id": repo, "sha": commit, "siblings": siblings}
        for place in ("", "/revision/main", f"/revision/{commit}"):
            self.files[f"/api/models/{repo}{place}"] = json.dumps(info).encode()


@contextmanager
def serving() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.ended.set()
            server.shutdown()
            thread.join()


def status(code: int) -> Answer:
    return lambda handler: handler.send_error(code)


def redirect(url: str) -> Answer:
    def answer(handler: Handler) -> None:
        handler.send_response(302)
        handler.send_header("Location", url)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    return answer


def stall(data: bytes) -> Answer:
    """Half of it, and then nothing."""

    def answer(handler: Handler) -> None:
        handler.give(data[: len(data) // 2], length=len(data))
        handler.wfile.flush()
        handler.server.ended.wait(20)

    return answer


def cut(data: bytes) -> Answer:
    """Half of it, and the end."""
    return lambda handler: handler.give(data[: len(data) // 2], length=len(data))


def reset(data: bytes) -> Answer:
    """A part of it, and a reset of the connection."""

    def answer(handler: Handler) -> None:
        import socket
        import struct

        handler.give(data[:10], length=len(data))
        handler.wfile.flush()
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        handler.connection.close()
        handler.close_connection = True
        # What the handler still writes as it ends goes nowhere.
        handler.wfile, handler.rfile = io.BytesIO(), io.BytesIO()

    return answer
