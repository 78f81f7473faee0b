"""The thread that owns an engine: requests and calls come in between two steps, outputs go out."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import Any

from ..engine.core import reason_of
from ..engine.engine import Engine
from ..errors import (
    EngineBusyError,
    EngineClosedError,
    EngineDeadError,
    EngineFullError,
    MultiloraError,
    RequestError,
    shown,
)
from ..outputs import RequestOutput
from .stream import Stream, Waiter, wake

logger = logging.getLogger(__name__)

MAX_PAUSE = 0.01  # seconds between two steps for what came in: streams do not wait for a crowd
POLL = 0.001  # seconds between two steps that can do nothing, since a policy has all wait


class _Call:
    """A function to be called with the engine, and where its result goes."""

    def __init__(self, function: Callable[[Engine], Any]) -> None:
        self.function = function
        self.future: Future[Any] = Future()


class EngineThread:
    """Steps an engine while it has work. Everything else that touches the engine waits in line.

    A signal handler or a finaliser may come amid anything: the inbox and the lock let the thread
    that is inside in again.
    """

    def __init__(self, engine: Engine, max_requests: int) -> None:
        self.engine, self._max_requests = engine, max_requests
        self.ended: Future[None] = Future()
        self._inbox: SimpleQueue[Stream | _Call | None] = SimpleQueue()
        self._left: deque[Stream] = deque()  # whose readers have gone
        self._streams: dict[str, Stream] = {}  # by request id; of the thread alone
        self._is_stopping = self._is_draining = False
        self._num_idle = 0  # steps in a row that did nothing
        self._num_steps = 0
        self._lock = threading.RLock()  # of the two below
        self._open: set[Stream] = set()  # that the engine has not done with
        self._refusal: tuple[type[MultiloraError], str] | None = None  # of whatever comes
        self._process = os.getpid()
        self._thread = threading.Thread(target=self._run, name="multilora-engine", daemon=True)
        self._thread.start()

    # Any thread -------------------------------------------------------------------------------

    @property
    def num_requests(self) -> int:
        """Requests that were taken and have not ended."""
        return len(self._open)

    def check(self, *, is_request: bool = False) -> None:
        """Raises why nothing, or no request, is taken."""
        if self._process != os.getpid():  # before the lock, which a thread of the other may hold
            raise EngineBusyError(
                "an AsyncEngine was used in a fork of the process that made it, where its thread "
                "is not: make one in each process, and start these by "
                "multiprocessing.get_context('spawn')"
            )
        if self._refusal is not None:
            kind, why = self._refusal
            raise kind(why)
        if is_request and self._is_draining:
            raise EngineClosedError(
                "the engine is being drained and takes no new requests; send them to another one"
            )

    def open(self, stream: Stream) -> None:
        """Queues a request; an EngineFullError at once where too many are."""
        self.check(is_request=True)
        with self._lock:
            self.check(is_request=True)
            if len(self._open) >= self._max_requests:
                raise EngineFullError(
                    f"{len(self._open)} requests run or wait, and that is all that may: send it "
                    "again when others have ended, or start with a larger max_waiting"
                )
            self._open.add(stream)
            self._inbox.put(stream)

    def leave(self, stream: Stream) -> None:
        """Its reader has gone: the request ends before the next step but one."""
        stream.is_left = True
        if stream in self._open:
            self._left.append(stream)

    def submit(self, function: Callable[[Engine], Any]) -> Future[Any]:
        """Has a function called with the engine between two steps."""
        self.check()
        call = _Call(function)
        with self._lock:
            self.check()
            self._inbox.put(call)
        return call.future

    def drain(self) -> None:
        """From now on no requests are taken."""
        self._is_draining = True

    def stop(self) -> None:
        """Has the thread end after the step that it is in; `ended` tells when."""
        self._is_stopping = True
        self._inbox.put(None)

    def join(self) -> None:
        """Stops it and waits for it; not in a fork, where there is none, nor in itself."""
        if self._process == os.getpid() and threading.current_thread() is not self._thread:
            self.stop()
            self._thread.join()

    # The thread itself ------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._take_in():
                if self.engine.has_work:
                    self._step()
            for request_id in self._streams:
                self.engine.abort(request_id)
            self._end(EngineClosedError, "the engine was shut down; make a new one")
        except EngineDeadError as error:
            self._end(EngineDeadError, str(error))
        except BaseException as error:
            logger.error(why := _ended_by(error), exc_info=error)
            self._end(EngineDeadError, why)
        finally:
            self.ended.set_result(None)

    def _end(self, kind: type[MultiloraError], why: str) -> None:
        """Tells everyone who waits; whoever comes later is told by `check`."""
        with self._lock:
            self._refusal = kind, why
        self._streams.clear()
        while not self._inbox.empty():
            item = self._inbox.get()
            if isinstance(item, _Call) and item.future.set_running_or_notify_cancel():
                item.future.set_exception(kind(why))
        waiters: dict[asyncio.AbstractEventLoop, list[Waiter]] = {}
        for stream in list(self._open):
            if (waiter := stream.end(kind(why))) is not None:
                waiters.setdefault(stream.loop, []).append(waiter)
        self._open.clear()
        wake(waiters)

    def _take_in(self) -> bool:
        """Does what has come, waiting for it where there is nothing else to do; False = the end."""
        while self._left:
            self._drop(self._left.popleft())
        if not self.engine.has_work:
            self._lose()
        wait = None if not self.engine.has_work else POLL if self._num_idle > 1 else 0.0
        until = 0.0
        while not self._is_stopping:
            try:
                item = self._inbox.get(wait != 0.0, wait)
            except Empty:
                return True
            until = until or time.monotonic() + MAX_PAUSE
            if isinstance(item, Stream):
                self._start(item)
            elif item is not None:
                self._call(item)
            self._num_idle, wait = 0, 0.0
            if time.monotonic() > until:
                return True
        return False

    def _start(self, stream: Stream) -> None:
        """Adds a request, unless its reader has gone before it came to that."""
        if stream.is_left:
            self._open.discard(stream)
            return
        try:
            request_id = stream.start(self.engine)
        except EngineDeadError:
            raise
        except Exception as error:
            self._fail(stream, error)
        else:
            self._streams[request_id] = stream
            stream.request_id = request_id

    def _call(self, call: _Call) -> None:
        if not call.future.set_running_or_notify_cancel():
            return
        try:
            result = call.function(self.engine)
        except Exception as error:
            call.future.set_exception(error)
            if isinstance(error, EngineDeadError):
                raise
        except BaseException as error:
            call.future.set_exception(EngineDeadError(_ended_by(error)))
            raise
        else:
            call.future.set_result(result)

    def _fail(self, stream: Stream, error: Exception) -> None:
        self._open.discard(stream)
        if (waiter := stream.end(error)) is not None:
            wake({stream.loop: [waiter]})

    def _lose(self) -> None:
        """Tells the readers of requests that somebody ended in the engine itself."""
        while self._streams:
            request_id, stream = self._streams.popitem()
            why = f"request {shown(request_id)} was ended in the engine; use AsyncEngine.abort"
            self._fail(stream, RequestError(why))

    def _drop(self, stream: Stream) -> None:
        """Ends the request of a reader that has gone."""
        if stream.request_id is not None and stream in self._open:
            self._open.discard(stream)
            del self._streams[stream.request_id]
            self.engine.abort(stream.request_id)

    def abort(self, request_id: str) -> bool:
        """Ends a request whose reader is told so; on the engine's thread."""
        stream = self._streams.pop(request_id, None) if isinstance(request_id, str) else None
        if stream is None:
            return self.engine.abort(request_id)
        everything = self.engine.output(request_id)
        self.engine.abort(request_id)
        self._open.discard(stream)
        if (waiter := stream.abort(everything)) is not None:
            wake({stream.loop: [waiter]})
        return True

    def _step(self) -> None:
        outputs = self.engine.step()
        if outputs:
            self._num_idle = 0
            self._tell(outputs)
            return
        steps = self.engine.stats.steps
        self._num_idle = self._num_idle + 1 if steps == self._num_steps else 0
        self._num_steps = steps

    def _tell(self, outputs: list[RequestOutput]) -> None:
        waiters: dict[asyncio.AbstractEventLoop, list[Waiter]] = {}
        for output in outputs:
            stream = self._streams.get(output.request_id)
            if stream is None:  # somebody added it to the engine by hand
                continue
            if output.finished:
                del self._streams[output.request_id]
                self._open.discard(stream)
            elif stream.loop.is_closed():  # its reader has gone, without a word
                self._left.append(stream)
            if (waiter := stream.put(output)) is not None:
                waiters.setdefault(stream.loop, []).append(waiter)
        wake(waiters)


def _ended_by(error: BaseException) -> str:
    return f"the engine's thread has ended ({reason_of(error)}); make a new engine"
