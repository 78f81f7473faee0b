"""A GPU that is a CPU: `CudaDevice` runs unchanged on a stand-in for what it calls of torch.cuda.

Work happens when it is called, so nothing here can show a missing wait; but every line of the GPU's
side runs, in order, with memories apart as on a GPU, and the calls are kept.
"""

from __future__ import annotations

import importlib.util
import time
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

import multilora_kernels as mk
from multilora.device.cpu_graph import CpuGraph, _Recorder
from multilora.device.cuda import CudaDevice
from multilora_kernels.cuda import dispatch

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pytest


class FakeCuda(CudaDevice):
    """A CudaDevice whose tensors are on the CPU."""

    def __init__(self, index: int = 0) -> None:
        super().__init__(index)
        self.torch = torch.device("cpu")


class Calls(list[str]):
    """The names of the calls, in order."""


def install(patch: pytest.MonkeyPatch) -> Calls:
    """Puts the stand-in in place of torch.cuda's functions."""
    calls = Calls()

    class Stream:
        made = 0

        def __init__(self, *_: Any) -> None:
            self.name = f"stream {Stream.made}"
            Stream.made += 1

        def wait_stream(self, other: Stream) -> None:
            calls.append(f"{self.name} waits for {other.name}")

    main_stream = Stream()
    main_stream.name, Stream.made = "main", 0

    @contextmanager
    def on_stream(stream: Any) -> Iterator[None]:
        calls.append(f"on {stream.name}")
        yield
        calls.append(f"off {stream.name}")

    @contextmanager
    def capturing(graph: Any, pool: Any = None, stream: Any = None) -> Iterator[None]:
        calls.append(f"capture in pool {pool} on {stream.name}")
        with mk.capture(mk.BufferPool()) as captured, _Recorder(captured) as recorder:
            yield
        graph.recording = CpuGraph.__new__(CpuGraph)
        graph.recording._steps, graph.recording._inputs = recorder.steps(), recorder.inputs

    class Graph:
        def replay(self) -> None:
            calls.append("replay")
            self.recording.replay()  # type: ignore[attr-defined]

        def pool(self) -> int:
            return 7

    class Event:
        def __init__(self, enable_timing: bool = False) -> None:
            self.time = 0.0

        def record(self) -> None:
            self.time = time.perf_counter()
            calls.append("record")

        def synchronize(self) -> None:
            calls.append("wait")

        def elapsed_time(self, end: Event) -> float:  # ms
            return 1e3 * (end.time - self.time)

    card = SimpleNamespace(
        major=9,
        minor=0,
        multi_processor_count=132,
        total_memory=80 * 10**9,
        L2_cache_size=1 << 14,
    )

    names = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_properties": lambda *_: card,
        "get_device_capability": lambda *_: (card.major, card.minor),
        "Stream": Stream,
        "current_stream": lambda *_: main_stream,
        "stream": on_stream,
        "graph": capturing,
        "CUDAGraph": Graph,
        "Event": Event,
        "set_device": lambda *_: None,
        "synchronize": lambda *_: calls.append("synchronize"),
        "empty_cache": lambda: None,
        "mem_get_info": lambda *_: (60 * 10**9, 80 * 10**9),
        "reset_peak_memory_stats": lambda *_: None,
        "memory_reserved": lambda *_: 10**9,
        "max_memory_reserved": lambda *_: 3 * 10**9,
        "get_device_name": lambda *_: "a fake GPU",
    }
    for name, value in names.items():
        patch.setattr(torch.cuda, name, value)
    patch.setattr(dispatch, "version", lambda name: "3.6.0")  # of triton, wherever there is none
    if importlib.util.find_spec("triton") is None:
        patch.setattr(mk.Compilations, "watch", lambda *_, **__: nullcontext())
    for name in ("zeros", "empty"):
        patch.setattr(torch, name, _unpinned(getattr(torch, name)))
    # On a GPU the buffer of a step is another memory than the host's.
    patch.setattr(CudaDevice, "device_buffer", lambda self, host: torch.full_like(host, 255))
    return calls


def _unpinned(make: Any) -> Any:
    def unpinned(*args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        found: torch.Tensor = make(*args, **kwargs)
        return found

    return unpinned
