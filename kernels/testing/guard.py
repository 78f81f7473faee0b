"""A sanitizer for kernels in Triton's interpreter: what a GPU would do silently becomes an error.

In the interpreter, as on a GPU, an address outside a tensor is read without complaint; and because
its programs run one after the other in order, a race is never seen. Under `guarded`

- every lane that is not masked must lie in the storage of a tensor of the launch,
- no two programs write one byte, and none reads a byte that another one writes,
- no store gives one address two values,
- masked lanes of a load without `other=`, undefined on a GPU, hold NaN or a huge integer,
- programs run in a shuffled order, if asked.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError

from .interpreter import Array, RepairedBuilder, repair


class GuardError(AssertionError):
    """A kernel did what it must not; the message names the program and the argument."""


@contextmanager
def guarded(
    *, order: int | None = None, extra: Sequence[Any] = (), hazards: bool = True
) -> Iterator[None]:
    """Watches every launch inside the block; GuardError is raised by the launch that errs.

    `order` is the seed of a shuffled order of programs, None for the usual order. `extra` are
    tensors that kernels reach by addresses stored in other tensors. `hazards=False` is for kernels
    whose programs speak to each other through memory on purpose.
    """
    repair()
    builder, executor = interpreter.interpreter_builder, interpreter.GridExecutor
    before = builder.__class__, executor.__call__, executor._init_args_hst
    builder.__class__ = _GuardedBuilder
    builder.guard = guard = _Guard(order, extra, hazards)

    def init_args(self: Any, args: Any, kwargs: Any) -> Any:
        found = before[2](self, args, kwargs)
        guard.begin([*zip(self.arg_names, found[0], strict=False), *found[1].items()])
        return found

    def call(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            before[1](self, *args, **kwargs)
        except InterpreterError as error:
            # The interpreter wraps an error once for each device function that it passes.
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, GuardError):
                cause = cause.__cause__
            raise (cause or error) from None

    executor.__call__, executor._init_args_hst = call, init_args
    try:
        yield
    finally:
        builder.__class__, executor.__call__, executor._init_args_hst = before
        del builder.guard


class _GuardedBuilder(RepairedBuilder):
    guard: _Guard

    def set_grid_dim(self, *grid: int) -> None:
        super().set_grid_dim(*grid)
        self.guard.shuffle(grid)

    def set_grid_idx(self, x: int, y: int, z: int) -> None:
        super().set_grid_idx(*self.guard.enter((x, y, z)))

    def create_masked_load(
        self, ptrs: Any, mask: Any, other: Any, *rest: Any, **options: Any
    ) -> Any:
        kind = ptrs.get_element_ty()
        lanes = _lanes(mask, ptrs)
        self.guard.read(ptrs.data[lanes], interpreter._get_np_dtype(kind).itemsize)
        if other is None and not lanes.all():
            other = _poison(ptrs.data.shape, kind)
        return super().create_masked_load(ptrs, mask, other, *rest, **options)

    def create_masked_store(
        self, ptrs: Any, value: Any, mask: Any, *rest: Any, **options: Any
    ) -> Any:
        lanes = _lanes(mask, ptrs)
        values = np.broadcast_to(value.data, ptrs.data.shape)[lanes]
        self.guard.write(ptrs.data[lanes], values)
        return super().create_masked_store(ptrs, value, mask, *rest, **options)

    def create_atomic_rmw(
        self, op: Any, ptr: Any, val: Any, mask: Any, sem: Any, scope: Any
    ) -> Any:
        lanes = _lanes(mask, ptr)
        self.guard.bounds(ptr.data[lanes], val.data.dtype.itemsize, "atomic")
        with self.guard.paused():
            return super().create_atomic_rmw(op, ptr, val, mask, sem, scope)

    def create_atomic_cas(self, ptr: Any, *rest: Any) -> Any:
        size = interpreter._get_np_dtype(ptr.get_element_ty()).itemsize
        self.guard.bounds(ptr.data.ravel(), size, "atomic")
        return super().create_atomic_cas(ptr, *rest)


def _lanes(mask: Any, ptrs: Any) -> Array:
    data = mask.data if isinstance(mask, interpreter.TensorHandle) else mask
    return np.broadcast_to(np.asarray(data, dtype=bool), ptrs.data.shape)


def _poison(shape: tuple[int, ...], kind: Any) -> Any:
    dtype = interpreter._get_np_dtype(kind)
    value: Any = np.nan
    if kind == tl.bfloat16:
        value = 0x7FC1
    elif kind.is_floating() and dtype.itemsize == 1:
        value = 0x7F
    elif dtype.kind == "b":
        value = True
    elif dtype.kind in "iu":
        value = np.iinfo(dtype).max // 2
    return interpreter.TensorHandle(np.full(shape, value, dtype=dtype), kind)


class _Guard:
    """What the launch may touch, and which program has touched it so far."""

    def __init__(self, order: int | None, extra: Sequence[Any], hazards: bool) -> None:
        self.order, self.extra, self.hazards = order, extra, hazards
        self.program: tuple[int, ...] = (0, 0, 0)
        self.number = 0
        self.active = False

    def begin(self, arguments: Sequence[tuple[str, Any]]) -> None:
        """A launch starts: finds the storages of its tensors."""
        named = [*arguments, *((f"extra[{i}]", t) for i, t in enumerate(self.extra))]
        spans: dict[tuple[int, int], str] = {}
        for name, value in named:
            for tensor in _tensors(value):
                storage = tensor.untyped_storage()
                start = storage.data_ptr()
                spans.setdefault((start, start + storage.nbytes()), name)
        self.names = [spans[span] for span in sorted(spans)]
        self.starts = np.array([start for start, _ in sorted(spans)], dtype=np.int64)
        self.ends = np.array([end for _, end in sorted(spans)], dtype=np.int64)
        sizes = self.ends - self.starts
        # For each byte: 0 = nobody, n = program n - 1, -1 = several programs.
        self.writers = [np.zeros(size, dtype=np.int32) for size in sizes]
        self.readers = [np.zeros(size, dtype=np.int32) for size in sizes]
        self.active = True

    def shuffle(self, grid: tuple[int, ...]) -> None:
        programs = list(itertools.product(*(range(count) for count in grid)))
        order = np.arange(len(programs))
        if self.order is not None:
            order = np.random.default_rng(self.order).permutation(len(programs))
        self.programs = {usual: programs[n] for usual, n in zip(programs, order, strict=True)}
        self.number = 0

    def enter(self, usual: tuple[int, int, int]) -> tuple[int, ...]:
        """The program that runs where `usual` would have run."""
        self.program = self.programs[usual]
        self.number += 1
        return self.program

    @contextmanager
    def paused(self) -> Iterator[None]:
        self.active = False
        try:
            yield
        finally:
            self.active = True

    def bounds(self, addresses: Array, size: int, what: str) -> Array:
        """The storage of each address; GuardError if one lies in none."""
        places = addresses.astype(np.int64)
        found = np.searchsorted(self.starts, places, side="right") - 1
        bad = (found < 0) | (places + size > self.ends[np.maximum(found, 0)])
        if bad.any():
            place = int(places[bad][0])
            distance = np.maximum(self.starts - place, place + size - self.ends)
            nearest = int(np.argmin(distance))
            raise GuardError(
                f"program {self.program}: {what} out of bounds in {int(bad.sum())} of "
                f"{places.size} lanes, the first at byte {place - int(self.starts[nearest])} of "
                f"{self.names[nearest]!r}, which has "
                f"{int(self.ends[nearest] - self.starts[nearest])}"
            )
        return found

    def read(self, addresses: Array, size: int) -> None:
        if not self.active or not addresses.size:
            return
        for n, bytes_ in self._bytes(addresses, size, "load"):
            self._refuse(self.writers[n][bytes_], n, "reads what another program writes")
            seen = self.readers[n][bytes_]
            self.readers[n][bytes_] = np.where((seen == 0) | (seen == self.number), self.number, -1)

    def write(self, addresses: Array, values: Array) -> None:
        if not self.active or not addresses.size:
            return
        for n, bytes_ in self._bytes(addresses, values.dtype.itemsize, "store"):
            self._refuse(self.writers[n][bytes_], n, "writes what another program writes")
            self._refuse(self.readers[n][bytes_], n, "writes what another program reads")
            self.writers[n][bytes_] = self.number
        unique, first, inverse = np.unique(addresses, return_index=True, return_inverse=True)
        bits = np.ascontiguousarray(values).view(f"u{values.dtype.itemsize}")
        if len(unique) < addresses.size and (bits[first][inverse.ravel()] != bits).any():
            raise GuardError(f"program {self.program}: one store gives one address two values")

    def _bytes(self, addresses: Array, size: int, what: str) -> Iterator[tuple[int, Array]]:
        """For each storage touched its number and the offsets of the bytes."""
        addresses = addresses.ravel()
        found = self.bounds(addresses, size, what)
        if not self.hazards:
            return
        for n in np.unique(found):
            offsets = addresses[found == n].astype(np.int64) - self.starts[n]
            yield int(n), (offsets[:, None] + np.arange(size)).ravel()

    def _refuse(self, owners: Array, storage: int, what: str) -> None:
        if ((owners != 0) & (owners != self.number)).any():
            raise GuardError(f"race: program {self.program} {what} in {self.names[storage]!r}")


def _tensors(value: Any) -> Iterator[Any]:
    if isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)
    elif hasattr(value, "untyped_storage"):
        yield value
    elif hasattr(value, "base"):  # a tensor descriptor, or a tensor under another dtype
        yield from _tensors(value.base)
