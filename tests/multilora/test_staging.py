"""The host values of a step in one buffer."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from multilora.device.cpu import Device
from multilora.device.input_buffer import ALIGN, InputBuffer, InputField


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


def fields(first: list[int]) -> dict[str, InputField]:
    return {
        "a": InputField(first, torch.int64, (5,), -1),
        "none": InputField([], torch.int32, (0,)),
        "b": InputField([0.5, 2.5], torch.float64, (2,)),
        "c": InputField(np.array([[1, 2], [3, 4]], np.int32), torch.int32, (2, 2)),
    }


@pytest.mark.parametrize("device", [Device(), Apart()], ids=["one memory", "two memories"])
def test_every_field_arrives_padded_and_aligned(device: Device) -> None:
    sent = InputBuffer(device, 1024).send(fields([7, 8]))
    assert sent["a"].tolist() == [7, 8, -1, -1, -1]
    assert sent["none"].tolist() == []
    assert sent["b"].tolist() == [0.5, 2.5]
    assert sent["c"].tolist() == [[1, 2], [3, 4]]
    start = sent["a"].data_ptr()
    assert all((t.data_ptr() - start) % ALIGN == 0 for t in sent.values() if t.numel())


def test_one_copy_and_the_same_addresses_at_every_step() -> None:
    device = Apart()
    staging = InputBuffer(device, 1024)
    first = staging.send(fields([1]))
    places = [t.data_ptr() for t in first.values()]
    for step in range(2, 6):
        sent = staging.send(fields([step]))
        assert [t.data_ptr() for t in sent.values()] == places
        assert first["a"][0] == step
    assert device.copies == 5
    assert device.waits == 2  # a host buffer is written again only after its copy was done


def test_values_that_do_not_fit_are_our_own_bug() -> None:
    with pytest.raises(AssertionError, match="does not fit"):
        InputBuffer(Device(), 64).send(fields([1]))
