"""The CPU's form of what a GPU can do, and the memory that this process may take."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import pytest
import torch

import multilora.device.cpu as device_module
from multilora.device.cpu import Device, DeviceMemory, host_memory, return_freed_memory


def test_memory_that_was_freed_goes_back_to_the_system() -> None:
    if not hasattr(ctypes.CDLL(None), "malloc_trim"):
        pytest.skip("the C library is not glibc")

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident()
    kept = [torch.ones(2**14) for _ in range(2000)]  # 128 MB that the C library does not map singly
    last = kept.pop()
    kept.clear()
    return_freed_memory()
    assert resident() - before < 32 << 20
    assert last.sum() == 2**14


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
