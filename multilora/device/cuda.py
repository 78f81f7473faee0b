"""An NVIDIA GPU: streams, pinned memory, CUDA graphs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import multilora_kernels as mk

from .cpu import CapturedGraph, Device, DeviceMemory, Fetch, Side

_cuda: Any = torch.cuda  # torch gives its streams and events no types


class CudaDevice(Device):
    """An NVIDIA GPU. All work runs on the current stream unless it is forked to the side."""

    is_cuda = True
    captures_on_demand = False
    WARM_UPS = 3  # runs before a capture

    def __init__(self, index: int) -> None:
        self.torch = torch.device("cuda", index)
        self.compilations = mk.Compilations()
        self._pool: Any = None  # the memory that all captured graphs share
        self._captures: Any = None  # the stream that they are all captured on
        self.activate()

    @property
    def name(self) -> str:
        """What a log line calls it."""
        return torch.cuda.get_device_name(self.torch)

    def activate(self) -> None:
        """Makes it the device on which this thread launches work."""
        torch.cuda.set_device(self.torch)

    def watch_compiler(self, *, serving: bool = False) -> AbstractContextManager[Any]:
        """Within, what Triton compiles counts in `compilations`, and is warned of if `serving`."""
        return self.compilations.watch(serving=serving)

    def row_bounds(self) -> Sequence[int]:
        """Row counts beyond each of which kernels are compiled anew, rising."""
        return mk.cuda.launch_plans.target_of(self.torch).plans.row_bounds()

    def host_buffer(self, num_bytes: int) -> Tensor:
        """Pinned memory."""
        return torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=True)

    def device_buffer(self, host: Tensor) -> Tensor:
        """Device memory for copies of `host`."""
        return torch.zeros_like(host, device=self.torch)

    def send(self, host: Tensor, target: Tensor) -> Callable[[], None]:
        """Starts a copy; the returned function waits until it is done."""
        target.copy_(host, non_blocking=True)
        return _event().synchronize

    def fetch(self, tensors: Sequence[Tensor]) -> Fetch:
        """Starts to copy tensors to pinned memory."""
        copies = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in tensors]
        for copy, tensor in zip(copies, tensors, strict=True):
            copy.copy_(tensor, non_blocking=True)
        return _OnItsWay(copies, _event())

    def side(self) -> Side:
        """A second stream."""
        return _CudaSide(_cuda.Stream(self.torch))

    def capture(self, work: Callable[[], Tensor]) -> CapturedGraph:
        """Runs the work a few times, for compilers and libraries to settle, then captures it.

        All on one stream, since cuBLAS keeps a workspace for each (32 MiB on Hopper). torch may
        free it with the first graph that goes, so graphs should live as long as each other.
        """
        stream = self._captures = self._captures or _cuda.Stream(self.torch)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(self.WARM_UPS):
                work()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=stream):
            output = work()
        self._pool = self._pool or graph.pool()
        return _CudaReplay(graph, output)

    def scratch(self) -> AbstractContextManager[Any]:
        """Nothing: torch keeps a GPU's memory."""
        return contextlib.nullcontext()

    def synchronize(self) -> None:
        """Waits for all work."""
        torch.cuda.synchronize(self.torch)

    def memory(self) -> DeviceMemory | None:
        """Free and total bytes; what torch caches but nobody uses is returned first."""
        torch.cuda.empty_cache()
        return DeviceMemory(*torch.cuda.mem_get_info(self.torch))

    def peak_of(self, work: Callable[[], Any]) -> int:
        """Bytes that the work needs beside what is allocated now."""
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.torch)
        # Reserved, not allocated: what fragmentation costs is gone as well.
        before = torch.cuda.memory_reserved(self.torch)
        work()
        self.synchronize()
        return torch.cuda.max_memory_reserved(self.torch) - before


class _CudaSide(Side):
    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream

    def fork(self) -> AbstractContextManager[Any]:
        # Also inside a capture: the events make the side stream part of the graph.
        self._stream.wait_stream(torch.cuda.current_stream())
        return torch.cuda.stream(self._stream)

    def join(self) -> None:
        torch.cuda.current_stream().wait_stream(self._stream)


@dataclass(frozen=True, slots=True)
class _OnItsWay:
    tensors: list[Tensor]
    done: torch.cuda.Event

    def wait(self) -> list[Tensor]:
        self.done.synchronize()
        return self.tensors


@dataclass(frozen=True, slots=True)
class _CudaReplay:
    graph: torch.cuda.CUDAGraph
    output: Tensor

    def replay(self) -> None:
        self.graph.replay()


def _event() -> torch.cuda.Event:
    event: torch.cuda.Event = _cuda.Event()
    event.record()
    return event
