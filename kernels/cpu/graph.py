"""Calls of the C++ library: made at once and, under `capture`, kept to be made again by a graph.

A `KernelSequence` is to the C++ library what a CUDA graph is to a GPU: it makes its calls again
without Python, torch's dispatcher and allocations. What a call reads and writes are addresses, and
it works on what lies there by then, so the memory must stay: results of captured calls come from
the capture's `BufferPool`.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ctypes import Structure, addressof, byref, c_double
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import index_checks
from . import native
from .buffer_pool import BufferPool

# The functions that a graph can call, in the order of MULTILORA_CALL_... in csrc/abi.h.
KINDS = (
    "lora",
    "paged_attention",
    "silu_mul",
    "rms_norm",
    "rope_store_kv",
    "linear",
    "lora_columns",
)

LARGEST = 256 << 20
"""Bytes of a result that a pool keeps; logits of all tokens of a prompt may have more."""


class KernelCall(NamedTuple):
    """One call of the C++ library. Its tensors are those that it reads and writes."""

    name: str  # of KINDS
    args: Structure
    tensors: tuple[Tensor, ...]


class Capture:
    """The calls that a thread makes under `capture`."""

    def __init__(self, pool: BufferPool) -> None:
        self.pool = pool
        self._calls: list[KernelCall] = []

    def add(self, call: KernelCall) -> None:
        """Keeps a call."""
        self._calls.append(call)

    def take(self) -> list[KernelCall]:
        """The calls since it was last asked."""
        found, self._calls = self._calls, []
        return found


class _ThreadState(threading.local):
    """What the calls of this thread are given besides their arguments.

    The project's one exception to "no global context": between a caller and these functions stands
    torch's dispatcher, which passes on what is in an op's schema and nothing else. Only `capture`
    and `results_in` write here, each for the length of a `with`; only `call` and `empty` read.
    """

    capture: Capture | None = None
    pool: BufferPool | None = None


_state = _ThreadState()


@contextmanager
def capture(pool: BufferPool) -> Iterator[Capture]:
    """Keeps the calls that this thread makes inside, with results in `pool`.

    The calls are made as well. Of captures inside of each other the innermost has them.
    """
    outer, _state.capture = _state.capture, Capture(pool)
    try:
        yield _state.capture
    finally:
        _state.capture = outer


def end_captures() -> None:
    """Ends this thread's captures, where an exception raised as one ended kept it from ending."""
    _state.capture = None


@contextmanager
def results_in(pool: BufferPool) -> Iterator[None]:
    """Results of this thread's calls come from the pool, but for very large ones.

    What torch allocates for a prompt's step goes back to the system after each operator, and comes
    as new pages: for 2,048 tokens the first write to them can take as long as the product itself.
    """
    outer, _state.pool = _state.pool, pool
    try:
        yield
    finally:
        _state.pool = outer


def call(name: str, args: Structure, *tensors: Tensor | None) -> None:
    """Calls a function of KINDS. IndexError for an index out of range."""
    index_checks.refuse(getattr(native.LIB, name)(byref(args)) or 0)
    if _state.capture is not None:
        used = tuple(t for t in tensors if t is not None)
        _state.capture.add(KernelCall(name, args, used))


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """`torch.empty` for the result of a call."""
    if _state.capture is not None:
        return _state.capture.pool.empty(shape, dtype)
    if _state.pool is not None and math.prod(shape) * dtype.itemsize <= LARGEST:
        return _state.pool.empty(shape, dtype)
    return torch.empty(tuple(shape), dtype=dtype)


class KernelSequence:
    """Calls that one C++ function makes in order, with torch's number of threads by then."""

    def __init__(self, calls: Sequence[KernelCall]) -> None:
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
