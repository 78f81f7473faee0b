"""One request's outputs on their way from the engine's thread to a reader in an event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from ..errors import EngineBusyError
from ..outputs import RequestOutput
from ..sampling_params import RequestOutputKind
from .deltas import NOTHING, MergedDeltas, Told, aborted

if TYPE_CHECKING:
    from ..engine.engine import Engine

Waiter = asyncio.Future[None]
"""What a reader awaits; it is done by its loop's thread alone."""


class Stream:
    """Holds one output at most: the newest cumulative one, or all that deltas told since."""

    def __init__(self, start: Callable[[Engine], str], kind: RequestOutputKind) -> None:
        """For a reader in the running loop. `start` adds the request, and gives its id."""
        self.loop = asyncio.get_running_loop()
        self.start = start
        self.request_id: str | None = None  # once it was added; of the engine's thread alone
        self.is_left = False  # its reader has gone
        # By answer, where outputs tell what is new; of the engine's thread alone.
        self._told: dict[int, Told] | None = {} if kind is RequestOutputKind.DELTA else None
        self._lock = threading.Lock()  # of all below
        self._news: RequestOutput | MergedDeltas | None = None
        self._is_over = False  # nothing comes any more
        self._error: BaseException | None = None  # why, where it did not finish
        self._waiter: Waiter | None = None

    # The engine's thread ----------------------------------------------------------------------

    def put(self, output: RequestOutput) -> Waiter | None:
        """Leaves an output for the reader; who must be woken for it."""
        if self._told is not None:
            for answer in output.outputs:
                chars = self._told.get(answer.index, NOTHING).chars + len(answer.text)
                tokens = answer.token_offset + len(answer.token_ids)
                self._told[answer.index] = Told(tokens, chars)
        with self._lock:
            if self._news is None or self._told is None:
                self._news = output
            else:
                if not isinstance(self._news, MergedDeltas):
                    self._news = MergedDeltas(self._news)
                self._news.add(output)
            self._is_over = output.finished
            return self._take_waiter()

    def abort(self, everything: RequestOutput) -> Waiter | None:
        """Ends with what has not been told, of the request's cumulative output."""
        return self.put(aborted(everything, self._told))

    def end(self, error: BaseException) -> Waiter | None:
        """The reader gets the error after what it has not read yet."""
        with self._lock:
            if not self._is_over:
                self._is_over, self._error = True, error
            return self._take_waiter()

    def _take_waiter(self) -> Waiter | None:
        waiter, self._waiter = self._waiter, None
        return waiter

    # The reader -------------------------------------------------------------------------------

    async def next(self) -> RequestOutput:
        """The next output; nothing may be asked for after a finished one."""
        if asyncio.get_running_loop() is not self.loop:
            raise EngineBusyError(
                "a stream is read in another event loop than the one in which it began: read it "
                "there, or call generate in this one"
            )
        while True:
            with self._lock:
                news, self._news = self._news, None
                if news is None and not self._is_over:
                    waiter = self._waiter = self.loop.create_future()
            if news is not None:
                return news.output() if isinstance(news, MergedDeltas) else news
            if self._is_over:
                assert self._error is not None, "it was read beyond its end"
                raise self._error
            await waiter


def wake(waiters: dict[asyncio.AbstractEventLoop, list[Waiter]]) -> None:
    """Wakes readers, all of one loop at once: that is one write to its pipe for each step."""
    for loop, some in waiters.items():
        try:
            loop.call_soon_threadsafe(_wake, some)
        except RuntimeError:  # it was closed: nobody waits there any more
            continue


def _wake(waiters: list[Waiter]) -> None:
    for waiter in waiters:
        if not waiter.done():  # its reader may have been cancelled
            waiter.set_result(None)
