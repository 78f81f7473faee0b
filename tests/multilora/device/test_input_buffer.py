"""The host values of a step in one buffer."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from multilora.device.cpu import Device
from multilora.device.input_buffer import ALIGN, InputBuffer


class Apart(Device):
    """A CPU that keeps its two memories apart, as a GPU does, and counts the copies."""

    is_cuda = True

    def __init__(self) -> None:
        super().__init__()
        self.copies = self.waits = 0

    def device_buffer(self, host: torch.Tensor) -> torch.Tensor:
        return torch.full_like(host, 255)

    def send(self, host: torch.Tensor, target: torch.Tensor) -> object:
        self.copies += 1
        target.copy_(host)

        def wait() -> None:
            self.waits += 1

        return wait


class Inner(NamedTuple):
    b: Tensor
    c: Tensor


class Values(NamedTuple):
    a: Tensor
    none: Tensor
    inner: Inner | None
    absent: Tensor | None
    last: Tensor


def values(first: int, *, whole: bool = True) -> Values:
    inner = Inner(torch.tensor([0.5, 2.5], dtype=torch.float64), torch.tensor([[1, 2], [3, 4]]))
    return Values(
        torch.arange(first, first + 5),
        torch.zeros(0, dtype=torch.int32),
        inner if whole else None,
        None,
        torch.tensor([first], dtype=torch.int32),
    )


def flat(sent: Values) -> list[Tensor]:
    parts = [sent.a, sent.none, *(sent.inner or ()), sent.last]
    return [part for part in parts if part.numel()]


@pytest.mark.parametrize("device", [Device(), Apart()], ids=["one memory", "two memories"])
def test_every_tensor_arrives_as_it_was_and_aligned(device: Device) -> None:
    buffer = InputBuffer(device, 1024)
    for first, whole in ((7, True), (1, False), (2, True)):
        given = values(first, whole=whole)
        sent = buffer.send(given)
        assert isinstance(sent, Values)
        assert sent.absent is None
        assert (sent.inner is None) == (not whole)
        assert sent.none.shape == (0,)
        assert all(map(torch.equal, flat(sent), flat(given)))
        assert [t.dtype for t in flat(sent)] == [t.dtype for t in flat(given)]
        start = sent.a.data_ptr()
        assert all((t.data_ptr() - start) % ALIGN == 0 for t in flat(sent))


def test_one_copy_and_the_same_addresses_at_every_step() -> None:
    device = Apart()
    buffer = InputBuffer(device, 1024)
    first = buffer.send(values(1))
    places = [t.data_ptr() for t in flat(first)]
    for step in range(2, 6):
        sent = buffer.send(values(step))
        assert [t.data_ptr() for t in flat(sent)] == places
        assert first.a[0] == step
    assert device.copies == 5
    assert device.waits == 2  # a host buffer is written again only after its copy was done


def test_values_that_do_not_fit_are_our_own_bug() -> None:
    with pytest.raises(AssertionError, match="do not fit"):
        InputBuffer(Device(), 64).send(values(1))
