"""What differs between a CPU and a GPU, in one place: memory, copies, streams, captured graphs.

`Device` is a CPU: work is done when a call returns, so most of it is the identity. `CudaDevice` has
the same methods. Nothing else asks which of the two it runs on, but for defaults and `limits`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

import multilora_kernels as mk

from .errors import ConfigError
from .recording import Recording

_cuda: Any = torch.cuda  # torch gives its streams and events no types


class Replay(Protocol):
    """Work that was captured once, and is done again on what its input buffers hold by then."""

    @property
    def output(self) -> Tensor:
        """What the work returned: the same memory at every replay."""

    def replay(self) -> None:
        """Does the work again."""


class Fetch(Protocol):
    """Tensors on their way to the host."""

    def wait(self) -> list[Tensor]:
        """The tensors in host memory, in the order of `fetch`."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of a device."""

    free: int
    total: int


def open_device(name: str) -> Device:
    """The device that "cpu", "cuda", "cuda:1" or "auto" means; a ConfigError if it is not there."""
    has_cuda = torch.cuda.is_available()
    if name == "cpu" or (name == "auto" and not has_cuda):
        return Device()
    if not has_cuda:
        why = (
            f"torch {torch.__version__} was built without CUDA"
            if torch.version.cuda is None
            else "no NVIDIA GPU or driver was found"
        )
        raise ConfigError(
            f"device {name!r} cannot be used: {why}; use device='cpu', or install torch with CUDA "
            "on a machine with an NVIDIA GPU"
        )
    index = torch.device("cuda" if name == "auto" else name).index or 0
    count = torch.cuda.device_count()
    if index >= count:
        raise ConfigError(f"device {name!r} is not there; this machine has cuda:0..{count - 1}")
    return CudaDevice(index)


class Device:
    """A CPU."""

    is_cuda = False
    captures_on_demand = True  # a capture does the work: the first step of a size can be one

    def __init__(self) -> None:
        self.torch = torch.device("cpu")
        self._results = mk.Pool()  # of kernels, in captured steps and others

    @property
    def name(self) -> str:
        """What a log line calls it."""
        return "cpu"

    def activate(self) -> None:
        """Makes it the device on which this thread launches work."""

    def host_buffer(self, num_bytes: int) -> Tensor:
        """uint8 host memory from which copies to the device need not wait."""
        return torch.zeros(num_bytes, dtype=torch.uint8)

    def device_buffer(self, host: Tensor) -> Tensor:
        """Device memory for copies of `host`; on a CPU it is that memory itself."""
        return host

    def send(self, host: Tensor, target: Tensor) -> Callable[[], None]:
        """Starts a copy; the returned function waits until `host` may be written again."""
        if target.data_ptr() != host.data_ptr():
            target.copy_(host)
        return _nothing

    def fetch(self, tensors: Sequence[Tensor]) -> Fetch:
        """Starts to copy tensors to the host."""
        return _Here(list(tensors))

    def side(self) -> Side:
        """A place for work beside the main stream."""
        return Side()

    def capture(self, work: Callable[[], Tensor]) -> Replay:
        """Keeps the work for replay; here it is done as well. It may use fixed buffers only."""
        return Recording(work, self._results)

    def scratch(self) -> AbstractContextManager[Any]:
        """Within, kernels put results where those of earlier steps were: use them in this step."""
        return mk.results_in(self._results)

    def synchronize(self) -> None:
        """Waits for all work."""

    def memory(self) -> Memory | None:
        """Free and total bytes; None where pages cost nothing until they are touched."""
        return None

    def peak_of(self, work: Callable[[], Any]) -> int:
        """Bytes that the work needs beside what is allocated now; on a CPU nobody counts."""
        work()
        return 0


class Side:
    """Work beside the main stream; on a CPU simply before what follows."""

    def fork(self) -> AbstractContextManager[Any]:
        """What runs inside starts after the work so far, and beside the work that follows."""
        return contextlib.nullcontext()

    def join(self) -> None:
        """What follows starts after the forked work."""


class CudaDevice(Device):
    """An NVIDIA GPU. All work runs on the current stream unless it is forked to the side."""

    is_cuda = True
    captures_on_demand = False
    WARM_UPS = 3  # runs before a capture

    def __init__(self, index: int) -> None:
        self.torch = torch.device("cuda", index)
        self._pool: Any = None  # the memory that all captured graphs share
        self.activate()

    @property
    def name(self) -> str:
        """What a log line calls it."""
        return torch.cuda.get_device_name(self.torch)

    def activate(self) -> None:
        """Makes it the device on which this thread launches work."""
        torch.cuda.set_device(self.torch)

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

    def capture(self, work: Callable[[], Tensor]) -> Replay:
        """Runs the work a few times, for compilers and libraries to settle, then captures it."""
        stream = _cuda.Stream(self.torch)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(self.WARM_UPS):
                work()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            output = work()
        self._pool = self._pool or graph.pool()
        return _CudaReplay(graph, output)

    def scratch(self) -> AbstractContextManager[Any]:
        """Nothing: torch keeps a GPU's memory."""
        return contextlib.nullcontext()

    def synchronize(self) -> None:
        """Waits for all work."""
        torch.cuda.synchronize(self.torch)

    def memory(self) -> Memory | None:
        """Free and total bytes; what torch caches but nobody uses is returned first."""
        torch.cuda.empty_cache()
        return Memory(*torch.cuda.mem_get_info(self.torch))

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
class _Here:
    tensors: list[Tensor]

    def wait(self) -> list[Tensor]:
        return self.tensors


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


def _nothing() -> None:
    pass
