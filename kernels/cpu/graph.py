"""Calls of the C++ library: made at once and, under a `Tape`, kept to be made again without Python.

What a call reads and writes are addresses. A `Program` makes its calls again on what lies there by
then, so the memory must stay: results of taped calls come from the tape's `Pool`.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ctypes import Structure, addressof, byref, c_double
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import index_checks
from . import native
from .buffer_pool import Pool

# The functions that a program can call, in the order of MULTILORA_CALL_... in csrc/abi.h.
KINDS = ("lora", "paged_attention", "silu_mul", "rms_norm", "rope_store_kv", "linear")


LARGEST = 256 << 20
"""Bytes of a result that a pool keeps; logits of all tokens of a prompt may have more."""


class Call(NamedTuple):
    """One call. Its tensors are those that it reads and writes."""

    name: str  # of KINDS
    args: Structure
    tensors: tuple[Tensor, ...]


class _Current(threading.local):
    tape: Tape | None = None
    pool: Pool | None = None


_current = _Current()


class Tape:
    """Keeps the calls that this thread makes inside of `with`."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self._calls: list[Call] = []
        self._outer: Tape | None = None

    def __enter__(self) -> Tape:
        self._outer, _current.tape = _current.tape, self
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _current.tape = self._outer

    def note(self, call: Call) -> None:
        """Keeps a call."""
        self._calls.append(call)

    def take(self) -> list[Call]:
        """The calls since it was last asked."""
        found, self._calls = self._calls, []
        return found


def call(name: str, args: Structure, *tensors: Tensor | None) -> None:
    """Calls a function of KINDS. IndexError for an index out of range."""
    index_checks.refuse(getattr(native.LIB, name)(byref(args)) or 0)
    if _current.tape is not None:
        _current.tape.note(Call(name, args, tuple(t for t in tensors if t is not None)))


@contextmanager
def results_in(pool: Pool) -> Iterator[None]:
    """Results of this thread's calls come from the pool, but for very large ones.

    What torch allocates for a prompt's step goes back to the system after each operator, and comes
    as new pages: for 2,048 tokens the first write to them can take as long as the product itself.
    """
    outer, _current.pool = _current.pool, pool
    try:
        yield
    finally:
        _current.pool = outer


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """`torch.empty` for the result of a call."""
    if _current.tape is not None:
        return _current.tape.pool.empty(shape, dtype)
    if _current.pool is not None and math.prod(shape) * dtype.itemsize <= LARGEST:
        return _current.pool.empty(shape, dtype)
    return torch.empty(tuple(shape), dtype=dtype)


class Program:
    """Calls that one C++ function makes in order, with torch's number of threads by then."""

    def __init__(self, calls: Sequence[Call]) -> None:
        self._args = [(call.name, call.args) for call in calls]
        self._calls = (native.CallArgs * len(calls))()
        for entry, call in zip(self._calls, calls, strict=True):
            entry.args, entry.kind = addressof(call.args), KINDS.index(call.name)

    def __len__(self) -> int:
        return len(self._args)

    def run(self) -> None:
        """Makes the calls. IndexError like `call`; those before the one at fault are then done."""
        self._run(None)

    def measure(self) -> list[tuple[str, Structure, float]]:
        """Makes the calls; the name, arguments and seconds of each."""
        seconds = (c_double * len(self))()
        self._run(seconds)
        return [(*args, spent) for args, spent in zip(self._args, seconds, strict=True)]

    def _run(self, seconds: Any) -> None:
        assert native.LIB is not None
        threads = torch.get_num_threads()
        index_checks.refuse(native.LIB.run_calls(self._calls, len(self), threads, seconds))
