"""Memory for what is large and lives long, in huge pages: weights, KV pages, rank pages.

Reading all of a model for every token misses the processor's table of 4-KiB pages all the time, and
the first write to each of them costs more than the write itself. Linux gives pages of 2 MiB to
memory for which it was asked to (its usual setting is `madvise`). torch does not ask, and what it
gives is often memory that was in use before, which stays as it is.
"""

from __future__ import annotations

import ctypes
import math
import mmap
from collections.abc import Sequence
from threading import Lock

import torch
from torch import Tensor

PAGE = 2 << 20  # bytes
REGION = 32 << 20


class Region:
    """A mapping, given away from its start. It is freed with the last tensor that lies in it."""

    def __init__(self, size: int) -> None:
        try:
            # Private: what is shared is no anonymous memory to Linux, and gets no huge pages.
            self.data = mmap.mmap(-1, size + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                self.data.madvise(mmap.MADV_HUGEPAGE)
        except OSError as error:
            raise MemoryError(f"{size} bytes cannot be mapped: {error}") from error
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.data))
        start = -self.address % PAGE
        self.used, self.end = start, start + size

    def take(self, size: int) -> int | None:
        """Where `size` bytes begin, or None if so many are not left."""
        start = -(-self.used // 64) * 64
        if start + size > self.end:
            return None
        self.used = start + size
        return start


class _Allocator:
    """Small tensors share a region, so that they too lie in huge pages."""

    def __init__(self) -> None:
        self._shared: Region | None = None
        self._lock = Lock()

    def take(self, size: int) -> tuple[mmap.mmap, int]:
        """A mapping and where in it `size` bytes of our own begin."""
        if size > REGION // 2:
            region = Region(size)
            return region.data, region.used
        with self._lock:
            start = None if self._shared is None else self._shared.take(size)
            if self._shared is None or start is None:
                self._shared = Region(REGION)
                start = self._shared.take(size)
            assert start is not None
            return self._shared.data, start


_allocator = _Allocator()


def empty_huge(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Tensor:
    """`torch.empty`, on a CPU in huge pages where the system has them.

    Memory is taken as it is written to, in steps of 2 MiB. MemoryError where none is left.
    """
    count = math.prod(shape)
    if torch.device(device).type != "cpu" or not hasattr(mmap, "MADV_HUGEPAGE") or count == 0:
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    data, start = _allocator.take(count * dtype.itemsize)
    return torch.frombuffer(data, dtype=dtype, count=count, offset=start).view(tuple(shape))
