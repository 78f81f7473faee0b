"""Which device a name means, and the CPU's form of what a GPU can do."""

from __future__ import annotations

import pytest
import torch

from multilora.device import Device, open_device
from multilora.errors import ConfigError

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


def test_the_cpu_is_there_and_auto_finds_it() -> None:
    assert open_device("cpu").torch == torch.device("cpu")
    assert open_device("auto").is_cuda == torch.cuda.is_available()


@no_gpu
@pytest.mark.parametrize("name", ["cuda", "cuda:3"])
def test_a_missing_gpu_is_an_error_with_the_cure(name: str) -> None:
    with pytest.raises(ConfigError, match=f"'{name}' cannot be used.*use device='cpu'"):
        open_device(name)


def test_a_gpu_beyond_the_last_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match=r"'cuda:2' is not there; this machine has cuda:0..1"):
        open_device("cuda:2")


def test_a_cpu_does_everything_at_once() -> None:
    device, x = Device(), torch.ones(3)
    assert device.fetch([x]).wait()[0] is x
    host = device.host_buffer(8)
    assert device.device_buffer(host) is host
    device.send(host, host)()
    assert device.peak_of(lambda: x.add_(1)) == 0
    side = device.side()
    with side.fork():
        x.add_(1)
    side.join()
    assert x.tolist() == [3, 3, 3]
    assert device.memory() is None
    replay = device.capture(lambda: x + 1)
    x.zero_()
    replay.replay()
    assert replay.output.tolist() == [1, 1, 1]
