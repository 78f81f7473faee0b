"""The host values of a step, packed into one buffer and sent to the device in one copy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from torch import Tensor

from .cpu import Device

ALIGN = 64  # bytes: any vector load of any kernel
_HOST_BUFFERS = 3  # two steps may be in flight while the next one is prepared

Tensors = TypeVar("Tensors", bound="tuple[Any, ...]")
"""A NamedTuple of tensors, of None where a part is left out, and of such NamedTuples."""


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where tensors of these dtypes and shapes lie."""

    key: Any  # type, dtypes and shapes
    num_bytes: int
    hosts: list[list[Tensor]]  # of each host buffer its views, one after the other
    device: Any  # the views of the device buffer, as they were given


class InputBuffer:
    """One device buffer that stays in place, and host buffers that take turns to fill it.

    Tensors of the same shapes in the same order lie at the same addresses at every `send`, which is
    what a captured graph reads.
    """

    def __init__(self, device: Device, num_bytes: int) -> None:
        self._device, self.num_bytes = device, num_bytes
        count = _HOST_BUFFERS if device.is_cuda else 1  # a CPU reads the host buffer itself
        self._hosts = [device.host_buffer(num_bytes) for _ in range(count)]
        self._target = device.device_buffer(self._hosts[0])
        self.reset()

    def reset(self) -> None:
        """Forgets all that was sent; nothing may be in flight any more."""
        self._waits: list[Callable[[], None]] = [_nothing] * len(self._hosts)
        self._turn = 0
        self._layout: _Layout | None = None  # the last one: most steps are like the one before

    def send(self, tensors: Tensors) -> Tensors:
        """The same on the device, of tensors on the host; valid until the next step's kernels."""
        key = type(tensors), _map(tensors, lambda t: (t.dtype, t.shape))
        layout = self._layout
        if layout is None or layout.key != key:
            layout = self._layout = self._lay_out(tensors, key)
        self._turn = turn = (self._turn + 1) % len(self._hosts)
        self._waits[turn]()
        for view, values in zip(layout.hosts[turn], _leaves(tensors), strict=True):
            view.copy_(values)
        end = layout.num_bytes
        self._waits[turn] = self._device.send(self._hosts[turn][:end], self._target[:end])
        return cast(Tensors, layout.device)

    def _lay_out(self, tensors: tuple[Any, ...], key: Any) -> _Layout:
        hosts: list[list[Tensor]] = [[] for _ in self._hosts]
        end = 0

        def place(tensor: Tensor) -> Tensor:
            nonlocal end
            start = -(-end // ALIGN) * ALIGN
            end = start + tensor.nbytes
            assert end <= self.num_bytes, f"{end} bytes do not fit the buffer of {self.num_bytes}"

            def view(buffer: Tensor) -> Tensor:
                return buffer[start:end].view(tensor.dtype).view(tensor.shape)

            for views, host in zip(hosts, self._hosts, strict=True):
                views.append(view(host))
            return view(self._target)

        device = _map(tensors, place)
        return _Layout(key, end, hosts, device)


def _map(value: Any, function: Callable[[Tensor], Any]) -> Any:
    """The same NamedTuple with `function` of each tensor."""
    if isinstance(value, Tensor):
        return function(value)
    return value if value is None else type(value)(*(_map(part, function) for part in value))


def _leaves(value: Any) -> Iterator[Tensor]:
    """Its tensors, in the order of `_map`."""
    if isinstance(value, Tensor):
        yield value
    elif value is not None:
        for part in value:
            yield from _leaves(part)


def _nothing() -> None:
    pass
