"""Memory that is used again: for results that come and go in one order at every step."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from .huge_pages import REGION, Region


class BufferPool:
    """Tensors of a pool; what one leaves is given to the next of about its size. Never shrinks."""

    def __init__(self) -> None:
        self._regions: list[Region] = []
        self._free: dict[int, list[tuple[Region, int]]] = {}  # by size, the last to come first
        self._live: dict[int, weakref.ref[memoryview]] = {}  # by address

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """`torch.empty` on a CPU."""
        count = math.prod(shape)
        if count == 0:
            return torch.empty(tuple(shape), dtype=dtype)
        size = 1 << max(count * dtype.itemsize - 1, 63).bit_length()
        free = self._free.setdefault(size, [])
        region, start = free.pop() if free else self._new(size)
        block = memoryview(region.data)[start : start + size]
        tensor = torch.frombuffer(block, dtype=dtype, count=count).view(tuple(shape))
        address = tensor.data_ptr()

        def give_back(_: object) -> None:
            del self._live[address]
            free.append((region, start))

        self._live[address] = weakref.ref(block, give_back)  # the tensor's memory holds the block
        return tensor

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
