"""One call at a time, on an engine that is in order."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import EngineBusyError, EngineDeadError, MultiloraError

if TYPE_CHECKING:
    from .core import EngineCore

_Method = TypeVar("_Method", bound=Callable[..., Any])


class Gate:
    """Who is inside of an engine. Other threads wait; a call from within a call is an error."""

    def __init__(self, core: EngineCore) -> None:
        self.core = core
        self.lock = threading.RLock()
        self.is_open = True


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
        core = gate.core
        entered = False
        try:
            with gate.lock:
                if not gate.is_open:
                    raise EngineBusyError(
                        f"Engine.{method.__name__} was called from within another call of the "
                        "engine, such as by a policy or a signal handler; call it later"
                    )
                gate.is_open = False
                try:
                    core.was_told()
                    entered = True
                    if core.dead is not None:
                        raise EngineDeadError(core.dead)
                    if core.is_torn:
                        core.recover()
                    return method(self, *args, **kwargs)
                finally:
                    gate.is_open = True
        except BaseException:
            # An interrupt came after the step, before its caller.
            if entered and core.telling is not None:
                core.news, core.told, core.telling = core.telling, (), None
            raise

    return call  # type: ignore[return-value]
