"""Which device a name means, and the CPU's form of what a GPU can do."""

from __future__ import annotations

import os

import pytest
import torch

import multilora.device.cpu as device_module
from multilora.device.cpu import Device, DeviceMemory, host_memory
from multilora.device.select import open_device
from multilora.errors import ConfigError
from tests.harness.fake_cuda import Calls, FakeCuda, install

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


def files(monkeypatch: pytest.MonkeyPatch, **content: str) -> None:
    """What the system's files say; others are not there."""
    by_path = {
        "/proc/meminfo": content.get("meminfo", ""),
        "/sys/fs/cgroup/memory.max": content.get("v2", ""),
        "/sys/fs/cgroup/memory/memory.limit_in_bytes": content.get("v1", ""),
    }
    monkeypatch.setattr(device_module, "_text", by_path.__getitem__)
    values = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 2**20}
    monkeypatch.setattr(os, "sysconf", values.__getitem__)


@pytest.mark.parametrize(
    ("content", "free"),
    [
        ({}, 2**32),
        ({"meminfo": "MemTotal: 9 kB\nMemAvailable:  1048576 kB\nBuffers: 1 kB\n"}, 2**30),
        ({"v2": "max\n"}, 2**32),
        ({"v2": "1000000\n"}, 1_000_000),
        ({"v1": "9223372036854771712\n"}, 2**32),
        ({"v1": "1000000\n", "meminfo": "MemAvailable: 5 kB\n"}, 5120),
    ],
    ids=str,
)
def test_a_machines_memory_is_what_this_process_may_take_of_it(
    monkeypatch: pytest.MonkeyPatch, content: dict[str, str], free: int
) -> None:
    files(monkeypatch, **content)
    assert host_memory() == DeviceMemory(free=free, total=2**32)


def test_a_system_that_does_not_say_has_no_known_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(name: str) -> int:
        raise ValueError(f"unrecognized configuration name {name}")

    monkeypatch.setattr(os, "sysconf", unknown)
    assert host_memory() is None


def test_this_machines_memory_is_known() -> None:
    found = host_memory()
    assert found is not None
    assert 2**20 < found.free <= found.total


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


def test_captures_warm_up_and_run_on_one_stream_and_share_their_memory(calls: Calls) -> None:
    device, x, runs = FakeCuda(), torch.ones(2), []

    def work() -> torch.Tensor:
        runs.append(1)
        return x + 1

    first = device.capture(work)
    assert len(runs) == 4
    second = device.capture(work)
    once = ["stream 0 waits for main", "on stream 0", "off stream 0", "main waits for stream 0"]
    assert calls == [
        *(*once, "capture in pool None on stream 0"),
        *(*once, "capture in pool 7 on stream 0"),
    ]
    x.zero_()
    for replay in (first, second):
        replay.replay()
        assert replay.output.tolist() == [1, 1]


def test_memory_is_what_the_driver_says(calls: Calls) -> None:
    device = FakeCuda()
    assert device.memory() == DeviceMemory(free=60 * 10**9, total=80 * 10**9)
    assert device.peak_of(lambda: None) == 2 * 10**9
    assert device.name == "a fake GPU"
