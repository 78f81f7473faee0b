"""`CudaDevice` on a stand-in for torch.cuda: what it calls, in which order."""

from __future__ import annotations

import pytest
import torch

from multilora.device.cpu import DeviceMemory
from tests.harness.fake_cuda import Calls, FakeCuda, install


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
