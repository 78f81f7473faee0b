"""Raises at any point of a piece of work that calls something; finds the points by itself.

A point is a place in our packages that calls: a file, a line and what is called there. Python tells
each call to `sys.setprofile`'s function, and raises there what that function raises.
"""

from __future__ import annotations

import gc
import itertools
import sys
import threading
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import multilora
import multilora_kernels

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

FOLDERS = tuple(
    str(Path(package.__file__).parent) + "/"
    for package in (multilora, multilora_kernels)
    if package.__file__
)
LOCKS = (type(threading.Lock()), type(threading.RLock()))


class Point(NamedTuple):
    """A place that calls."""

    file: str
    line: int
    called: str
    when: int  # 0 = the first call of this place, 1 = the second, ...


class _Watch:
    """Sees the calls that our files make, while `with` lasts."""

    def __init__(self) -> None:
        self.counts: dict[tuple[str, int, str], int] = {}

    def __enter__(self) -> Any:
        sys.setprofile(self._see)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)

    def _see(self, frame: FrameType, event: str, arg: Any) -> None:
        caller: FrameType | None = frame
        if event == "call":
            caller, called = frame.f_back, frame.f_code.co_name
        elif event == "c_call":
            called = getattr(arg, "__name__", "?")
            # Python handles no signal between the end of a `with` and the call that ends it: what
            # is raised here alone would leave a lock locked.
            if called == "__exit__" and isinstance(getattr(arg, "__self__", None), LOCKS):
                return
        else:
            return
        if caller is None or not caller.f_code.co_filename.startswith(FOLDERS):
            return
        place = caller.f_code.co_filename, caller.f_lineno, called
        count = self.counts.get(place, 0)
        self.counts[place] = count + 1
        self.reached(Point(*place, count))

    def reached(self, point: Point) -> None:
        """What happens at a point."""


class _Bomb(_Watch):
    def __init__(self, error: BaseException, is_here: Callable[[Point], bool]) -> None:
        super().__init__()
        self.error, self.is_here, self.has_gone_off = error, is_here, False

    def reached(self, point: Point) -> None:
        if not self.has_gone_off and self.is_here(point):
            self.has_gone_off = True
            raise self.error


def points_of(work: Callable[[], Any]) -> list[Point]:
    """Every place of the work that calls, at its first call and, if it has others, at its last."""
    with _Watch() as watch:
        work()
    found = []
    for place, count in watch.counts.items():
        found += [Point(*place, when) for when in sorted({0, count - 1})]
    return found


def calls_of(work: Callable[[], Any]) -> int:
    """How many calls our packages make in a piece of work: a measure of it that no clock enters."""
    with _Watch() as watch:
        work()
    return sum(watch.counts.values())


def raised_at(point: Point, error: BaseException, work: Callable[[], Any]) -> bool | None:
    """Does the work with `error` raised at the point: None if it never came there.

    True if the work raised the error itself, False if it went on in spite of it. What is raised in
    a finalizer goes nowhere, as Python has it.
    """
    return _raised(error, lambda here: here == point, work)


def raised_at_call(number: int, error: BaseException, work: Callable[[], Any]) -> bool | None:
    """Like `raised_at`, at call number `number` of the work, wherever that is."""
    numbers = itertools.count()
    return _raised(error, lambda _: next(numbers) == number, work)


def as_the_lock_opens(act: Callable[[], None], work: Callable[[], Any]) -> None:
    """Does the work of an engine's call, and acts when the call has given the lock back.

    What `act` raises comes out of the call, before it has returned.
    """

    def see(frame: FrameType, event: str, called: Any) -> None:
        in_gate = frame.f_code.co_filename.endswith("engine/exclusive.py")
        if event == "c_return" and in_gate and called.__name__ == "__exit__":
            sys.setprofile(None)
            act()

    sys.setprofile(see)
    try:
        work()
    finally:
        sys.setprofile(None)


class _Left:
    """Whether something was raised whose remains nobody has collected."""

    is_there = False


def collect_remains() -> None:
    """Collects what exceptions of this module left: a file, say, that Python closes and warns of.

    Else it does so in the middle of another test, which then fails.
    """
    if _Left.is_there:
        _Left.is_there = False
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            gc.collect()


def _raised(
    error: BaseException, is_here: Callable[[Point], bool], work: Callable[[], Any]
) -> bool | None:
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    _Left.is_there = True
    try:
        with _Bomb(error, is_here) as bomb:
            work()
    except BaseException as found:
        # What CPython 3.11 makes of it, some once in ten thousand times, where a profiler raises as
        # a `with` is left by an exception: it calls what lies in the place of `__exit__`.
        is_pythons = isinstance(found, TypeError) and "'traceback' object" in str(found)
        if found is not error and not is_pythons:
            raise
        return True
    finally:
        sys.unraisablehook = hook
    return False if bomb.has_gone_off else None
