"""The host values of a step, packed into one buffer and sent to the device in one copy."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .cpu import Device

ALIGN = 64  # bytes: any vector load of any kernel
_HOST_BUFFERS = 3  # two steps may be on their way while the next one is prepared
_NUMPY = {
    torch.int64: np.int64,
    torch.int32: np.int32,
    torch.float32: np.float32,
    torch.float64: np.float64,
}


@dataclass(frozen=True, slots=True)
class InputField:
    """Values of one kind, and the shape that they are padded to."""

    values: list[int] | list[float] | np.ndarray  # a list has one dimension
    dtype: torch.dtype
    shape: tuple[int, ...]
    fill: int | float = 0  # beyond the values


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where fields of these shapes lie, and their views of the device buffer."""

    shapes: list[tuple[torch.dtype, tuple[int, ...]]]
    ends: list[tuple[int, int]]  # first byte and last of each
    views: dict[str, Tensor]


class InputBuffer:
    """One device buffer that stays in place, and host buffers that take turns to fill it.

    Fields of the same shapes in the same order lie at the same addresses at every `send`, which is
    what a captured graph reads.
    """

    def __init__(self, device: Device, num_bytes: int) -> None:
        self._device, self.num_bytes = device, num_bytes
        count = _HOST_BUFFERS if device.is_cuda else 1  # a CPU reads the host buffer itself
        self._hosts = [device.host_buffer(num_bytes) for _ in range(count)]
        self._arrays = [host.numpy() for host in self._hosts]
        self._waits: list[Callable[[], None]] = [lambda: None] * count
        self._target = device.device_buffer(self._hosts[0])
        self._turn = 0
        self._layout = _Layout([], [], {})  # the last one: most steps are like the one before

    def send(self, fields: Mapping[str, InputField]) -> dict[str, Tensor]:
        """Views of the device buffer, one for each field; valid until the next step's kernels."""
        shapes = [(field.dtype, field.shape) for field in fields.values()]
        if shapes != self._layout.shapes or list(self._layout.views) != list(fields):
            self._layout = self._lay_out(fields, shapes)
        self._turn = (self._turn + 1) % len(self._hosts)
        self._waits[self._turn]()
        array, end = self._arrays[self._turn], 0
        for field, (start, end) in zip(fields.values(), self._layout.ends, strict=True):
            _write(array[start:end].view(_NUMPY[field.dtype]), field)
        host = self._hosts[self._turn]
        self._waits[self._turn] = self._device.send(host[:end], self._target[:end])
        return self._layout.views

    def _lay_out(
        self, fields: Mapping[str, InputField], shapes: list[tuple[torch.dtype, tuple[int, ...]]]
    ) -> _Layout:
        views, ends, end = {}, [], 0
        for name, field in fields.items():
            start = -(-end // ALIGN) * ALIGN
            end = start + math.prod(field.shape) * field.dtype.itemsize
            assert end <= self.num_bytes, f"{name} does not fit the staging buffer"
            ends.append((start, end))
            views[name] = self._target[start:end].view(field.dtype).view(field.shape)
        return _Layout(shapes, ends, views)


def _write(flat: np.ndarray, field: InputField) -> None:
    if isinstance(field.values, list):
        flat[: len(field.values)] = field.values
        flat[len(field.values) :] = field.fill
        return
    rest = flat.reshape(field.shape)
    if field.values.shape != field.shape:
        rest.fill(field.fill)
    rest[tuple(slice(size) for size in field.values.shape)] = field.values
