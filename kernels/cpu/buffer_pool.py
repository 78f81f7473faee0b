"""Memory that is used again: for results that come and go in one order at every step."""

from __future__ import annotations

import math
import weakref
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from .huge_pages import REGION, Region


class _Lent(weakref.ref[memoryview]):
    """A block of memory that a tensor has, and where it goes back to."""

    __slots__ = ("address", "free", "place")

    address: int
    free: list[tuple[Region, int]]
    place: tuple[Region, int]


class BufferPool:
    """Tensors of a pool; what one leaves is given to the next of about its size. Never shrinks."""

    def __init__(self) -> None:
        self._regions: list[Region] = []
        self._free: dict[int, list[tuple[Region, int]]] = {}  # by size, the last to come first
        self._live: dict[int, _Lent] = {}  # by address
        # Blocks that nobody has any more. What a finalizer raises goes nowhere, a Ctrl-C too, so
        # it calls nothing of Python's: they are taken back when the next block is asked for.
        self._returned: deque[_Lent] = deque()

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """`torch.empty` on a CPU."""
        count = math.prod(shape)
        if count == 0:
            return torch.empty(tuple(shape), dtype=dtype)
        size = 1 << max(count * dtype.itemsize - 1, 63).bit_length()
        self._take_back()
        free = self._free.setdefault(size, [])
        region, start = free.pop() if free else self._new(size)
        block = memoryview(region.data)[start : start + size]
        tensor = torch.frombuffer(block, dtype=dtype, count=count).view(tuple(shape))
        address, place = tensor.data_ptr(), (region, start)
        # The tensor's memory holds the block. Nothing is called from here on: a Ctrl-C would leave
        # a block that comes back and does not say from where.
        lent = _Lent(block, self._returned.append)
        lent.address, lent.free, lent.place = address, free, place
        self._live[address] = lent
        return tensor

    def _take_back(self) -> None:
        while self._returned:
            lent = self._returned.popleft()
            del self._live[lent.address]
            lent.free.append(lent.place)

    def owns(self, tensor: Tensor) -> bool:
        """Whether the tensor lies in the pool."""
        return self._region_of(tensor) is not None

    def borrow(self, tensor: Tensor) -> Tensor:
        """A dense tensor of the pool whose memory goes back all the same: to be read right away."""
        region = self._region_of(tensor)
        assert region is not None
        flat = torch.frombuffer(
            region.data,
            dtype=tensor.dtype,
            count=tensor.numel(),
            offset=tensor.data_ptr() - region.address,
        )
        return flat.view(tensor.shape)

    def _new(self, size: int) -> tuple[Region, int]:
        start = self._regions[-1].take(size) if self._regions else None
        if start is None:
            self._regions.append(Region(max(size, REGION)))
            start = self._regions[-1].take(size)
            assert start is not None
        return self._regions[-1], start

    def _region_of(self, tensor: Tensor) -> Region | None:
        for region in self._regions:
            if region.address <= tensor.data_ptr() < region.address + region.end:
                return region
        return None
