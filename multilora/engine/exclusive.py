"""One call at a time, on an engine that is in order."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from functools import wraps
from threading import get_ident
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from ..errors import ConfigError, EngineBusyError, EngineDeadError, MultiloraError

if TYPE_CHECKING:
    from .core import EngineCore

_Method = TypeVar("_Method", bound=Callable[..., Any])


class _Made:
    """In which process the first engine was made."""

    process: int | None = None


def check_process() -> None:
    """Raises a ConfigError in a fork of a process that has made an engine, before it would hang.

    OpenMP believes that the threads are there which the fork lacks, and waits for them.
    """
    if _Made.process not in (None, os.getpid()) and torch.get_num_threads() > 1:
        raise ConfigError(
            "this process is a fork of one that had made an engine: OpenMP's threads are not here, "
            "and the first computation would wait for them for ever; start it by "
            "multiprocessing.get_context('spawn')"
        )
    _Made.process = _Made.process or os.getpid()


class Gate:
    """Who is inside of an engine. Other threads wait; a call from within a call is an error."""

    def __init__(self, core: EngineCore) -> None:
        self.core = core
        self.process = os.getpid()
        self.lock = threading.RLock()
        # The thread that is inside, or whose call is through and may still be interrupted on its
        # way back: what it was to tell is then told by the next call, which must not come before.
        self.caller: int | None = None


class Change:
    """While inside, the core is torn; after an error that we raise ourselves it is not."""

    def __init__(self, core: EngineCore) -> None:
        self._core = core

    def __enter__(self) -> None:
        self._core.is_torn = True

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or issubclass(kind, MultiloraError):
            self._core.is_torn = False


def exclusive(method: _Method) -> _Method:
    """A public method of an object that has a `_gate`."""

    @wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        gate: Gate = self._gate
        core, me = gate.core, get_ident()
        if gate.process != os.getpid():  # before the lock, which a thread of the other may hold
            raise EngineBusyError(
                f"Engine.{method.__name__} was called in a fork of the process that made the "
                "engine, whose threads are not here: make an engine in each process, and start "
                "these by multiprocessing.get_context('spawn')"
            )
        if gate.caller == me:
            raise EngineBusyError(
                f"Engine.{method.__name__} was called from within another call of the engine, such "
                "as by a policy or a signal handler; call it later"
            )
        is_inside = is_told = False
        try:
            while True:
                with gate.lock:
                    if gate.caller is None:
                        is_inside, gate.caller = True, me
                        core.was_told()
                        is_told = True
                        if core.dead is not None:
                            raise EngineDeadError(core.dead)
                        if core.is_torn:
                            core.recover()
                        found = method(self, *args, **kwargs)
                        break
                threading.Event().wait(0.001)  # for another thread's call, on its way back
            # Python handles no signal between these two.
            gate.caller = None
            return found
        except BaseException:
            if is_told and core.telling is not None:
                core.news, core.told, core.telling = core.telling, (), None
            if is_inside:
                gate.caller = None
            raise

    return call  # type: ignore[return-value]
