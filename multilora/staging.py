"""The host values of a step, packed into one buffer and sent to the device in one copy."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .device import Device

ALIGN = 64  # bytes: any vector load of any kernel
_HOST_BUFFERS = 3  # two steps may be on their way while the next one is prepared


@dataclass(frozen=True, slots=True)
class Field:
    """Values of one kind, and the shape that they are padded to."""

    values: Any  # a list or an array, of any shape that fits
    dtype: torch.dtype
    shape: tuple[int, ...]
    fill: int | float = 0  # beyond the values


class Staging:
    """One device buffer that stays in place, and host buffers that take turns to fill it.

    Fields of the same shapes in the same order lie at the same addresses at every `send`, which is
    what a captured graph reads.
    """

    def __init__(self, device: Device, num_bytes: int) -> None:
        self._device, self.num_bytes = device, num_bytes
        count = _HOST_BUFFERS if device.is_cuda else 1  # a CPU reads the host buffer itself
        self._hosts = [device.host_buffer(num_bytes) for _ in range(count)]
        self._waits: list[Callable[[], None]] = [lambda: None] * count
        self._target = device.device_buffer(self._hosts[0])
        self._turn = 0

    def send(self, fields: Mapping[str, Field]) -> dict[str, Tensor]:
        """Views of the device buffer, one for each field; valid until the next step's kernels."""
        self._turn = (self._turn + 1) % len(self._hosts)
        self._waits[self._turn]()
        host = self._hosts[self._turn]
        places: dict[str, tuple[int, int]] = {}
        end = 0
        for name, field in fields.items():
            start = -(-end // ALIGN) * ALIGN
            end = start + math.prod(field.shape) * field.dtype.itemsize
            places[name] = start, end
            assert end <= self.num_bytes, f"{name} does not fit the staging buffer"
            _write(host[start:end].view(field.dtype).view(field.shape), field)
        self._waits[self._turn] = self._device.send(host[:end], self._target[:end])
        return {
            name: self._target[start:end].view(fields[name].dtype).view(fields[name].shape)
            for name, (start, end) in places.items()
        }

    @staticmethod
    def bytes_for(fields: Mapping[str, Field]) -> int:
        """Bytes that fields of these shapes take."""
        return sum(ALIGN + math.prod(f.shape) * f.dtype.itemsize for f in fields.values())


def _write(view: Tensor, field: Field) -> None:
    array = view.numpy()
    counts = _extent(field.values, len(field.shape))
    if counts != field.shape:
        array.fill(field.fill)
    array[tuple(slice(count) for count in counts)] = field.values


def _extent(values: Any, dims: int) -> tuple[int, ...]:
    return tuple(values.shape) if hasattr(values, "shape") else (len(values),)
