"""The process in which chat templates run: one for this process, started when first needed.

A template can only harm that process: it has so much memory and so much of the processor's time,
and is killed when no reply comes. It is kept for the next rendering. It is a fresh interpreter and
no fork, which would copy the locks of this process's threads.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import TokenizerError

MEMORY = 512 << 20  # bytes of address space
WAIT = 10.0  # seconds of the clock for each of the processor's, on a busy machine
KEPT = ("LD_LIBRARY_PATH", "TZ")  # of the environment
PROGRAM = (
    "import sys; sys.path += sys.argv[2:]; from tokenization.template_sandbox import serve; "
    "serve(int(sys.argv[1]), sys.stdin.buffer, sys.stdout.buffer)"
)


class TemplateLimitError(Exception):
    """The rendering took too much; its process is gone."""


class TemplateProcess:
    """Renders in another process, one at a time; threads wait for each other."""

    def __init__(self, memory: int = MEMORY) -> None:
        self._memory = memory
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None

    def ask(self, request: dict[str, Any], seconds: float) -> dict[str, Any]:
        """The sandbox's reply to a request, within `seconds` of the processor's time.

        Raises TemplateLimitError, with the words that follow "the template".
        """
        message = json.dumps({**request, "seconds": seconds}).encode()
        with self._lock:
            child, self._child = self._child, None
            if child is not None and child.poll() is not None:
                _end(child)
                child = None
            child = child or self._start()
            try:
                deadline = time.monotonic() + WAIT * max(seconds, 0.5)
                reply = _exchange(child, message, deadline)
            except (EOFError, TimeoutError, BrokenPipeError) as error:
                raise TemplateLimitError(_end_of(child, error, seconds)) from error
            except BaseException:  # a reply may still come, and is nobody's
                _end(child)
                raise
            self._child = child
            return reply

    def close(self) -> None:
        """Ends the process; the next request starts another."""
        with self._lock:
            child, self._child = self._child, None
            if child is not None:
                _end(child)

    def forget(self) -> None:
        """In a fork: the process belongs to the parent."""
        self._lock, self._child = threading.Lock(), None

    def _start(self) -> subprocess.Popen[bytes]:
        places = {str(Path(__file__).parents[1])}
        for name in ("jinja2", "markupsafe"):
            spec = find_spec(name)
            if spec is None or spec.origin is None:
                raise TokenizerError(f"chat templates need {name}; pip install {name}")
            places.add(str(Path(spec.origin).parents[1]))
        command = [sys.executable, "-I", "-S", "-c", PROGRAM, str(self._memory), *sorted(places)]
        pipe = subprocess.PIPE
        try:
            return subprocess.Popen(
                command,
                stdin=pipe,
                stdout=pipe,
                stderr=subprocess.DEVNULL,
                bufsize=0,
                cwd="/",
                env={name: os.environ[name] for name in KEPT if name in os.environ},
                start_new_session=True,  # Ctrl-C is not for it
            )
        except OSError as error:
            raise TokenizerError(
                f"{sys.executable!r} cannot be started to render chat templates: {error}"
            ) from error


def _exchange(child: subprocess.Popen[bytes], message: bytes, deadline: float) -> dict[str, Any]:
    assert child.stdin is not None
    assert child.stdout is not None
    view = memoryview(len(message).to_bytes(8, "little") + message)
    while view:
        view = view[os.write(child.stdin.fileno(), view) :]
    size = int.from_bytes(_read(child.stdout.fileno(), 8, deadline), "little")
    reply = json.loads(_read(child.stdout.fileno(), size, deadline))
    assert isinstance(reply, dict)
    return reply


def _read(file: int, size: int, deadline: float) -> bytes:
    poll = select.poll()
    poll.register(file, select.POLLIN)
    parts = []
    while size:
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise TimeoutError
        part = os.read(file, min(size, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _end(child: subprocess.Popen[bytes]) -> None:
    child.kill()
    child.communicate()


def _end_of(child: subprocess.Popen[bytes], error: Exception, seconds: float) -> str:
    """Why there is no reply: words that follow "the template"."""
    if not isinstance(error, TimeoutError):
        with suppress(subprocess.TimeoutExpired):
            child.wait(timeout=1)  # it is about to end, and has a reason
    _end(child)
    status = child.returncode
    if isinstance(error, TimeoutError) or status == -signal.SIGPROF:
        return f"took longer than {seconds:g} s"
    if status > 0:
        return f"has no process to run in: `{sys.executable} -I -c 'import jinja2'` must work"
    return f"ended its process by signal {-status}, as a lack of memory does"


PROCESS = TemplateProcess()
atexit.register(PROCESS.close)
os.register_at_fork(after_in_child=PROCESS.forget)
