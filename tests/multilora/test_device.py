"""Which device a name means, and the CPU's form of what a GPU can do."""

from __future__ import annotations

import pytest
import torch

from multilora.device.cpu import Device, DeviceMemory
from multilora.device.select import open_device
from multilora.errors import ConfigError
from tests.fake_cuda import Calls, FakeCuda, install

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


# The GPU's side, on a stand-in for torch.cuda -----------------------------------------------------


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return install(monkeypatch)


def test_a_copy_is_followed_by_its_event(calls: Calls) -> None:
    device = FakeCuda()
    host = device.host_buffer(8).fill_(3)
    target = device.device_buffer(host)
    wait = device.send(host, target)
    assert calls == ["record"]
    wait()
    assert calls == ["record", "wait"]
    assert torch.equal(target, host)


def test_fetched_tensors_wait_for_one_event(calls: Calls) -> None:
    fetch = FakeCuda().fetch([torch.ones(2), torch.zeros(3, dtype=torch.int64)])
    assert calls == ["record"]
    found = fetch.wait()
    assert calls == ["record", "wait"]
    assert [t.tolist() for t in found] == [[1, 1], [0, 0, 0]]


def test_the_side_stream_is_forked_and_joined(calls: Calls) -> None:
    side = FakeCuda().side()
    with side.fork():
        calls.append("work")
    side.join()
    waits = ["stream 0 waits for main", "on stream 0", "work", "off stream 0"]
    assert calls == [*waits, "main waits for stream 0"]


def test_a_capture_warms_up_on_another_stream_and_shares_its_memory(calls: Calls) -> None:
    device, x, runs = FakeCuda(), torch.ones(2), []

    def work() -> torch.Tensor:
        runs.append(1)
        return x + 1

    first = device.capture(work)
    assert len(runs) == 4
    second = device.capture(work)
    assert [call for call in calls if "capture" in call] == [
        "capture in pool None",
        "capture in pool 7",
    ]
    assert calls[:2] == ["stream 0 waits for main", "on stream 0"]
    x.zero_()
    for replay in (first, second):
        replay.replay()
        assert replay.output.tolist() == [1, 1]


def test_memory_is_what_the_driver_says(calls: Calls) -> None:
    device = FakeCuda()
    assert device.memory() == DeviceMemory(free=60 * 10**9, total=80 * 10**9)
    assert device.peak_of(lambda: None) == 2 * 10**9
    assert device.name == "a fake GPU"
