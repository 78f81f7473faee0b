"""What differs between a CPU and a GPU, in one place: memory, copies, streams, captured graphs.

`Device` is a CPU: work is done when a call returns, so most of it is the identity. `CudaDevice` has
the same methods. But for defaults and `capabilities` nothing else asks which of the two it has.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

import multilora_kernels as mk

from .cpu_graph import CpuGraph, end_captures

_CGROUP_LIMITS = ("memory.max", "memory/memory.limit_in_bytes")  # of version 2, and of 1


class CapturedGraph(Protocol):
    """Work that was captured once, and is done again on what its input buffers hold by then."""

    @property
    def output(self) -> Tensor:
        """What the work returned: the same memory at every replay."""

    def replay(self) -> None:
        """Does the work again."""


class Fetch(Protocol):
    """Tensors that are being copied to the host."""

    def wait(self) -> list[Tensor]:
        """The tensors in host memory, in the order of `fetch`."""


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Bytes of a device."""

    free: int
    total: int


def host_memory() -> DeviceMemory | None:
    """Bytes of the machine, and how many of them are free for this process; None if unknown.

    A container's limit counts as far as it is found.
    """
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # no POSIX system, or one that does not say
        return None
    found = re.search(r"MemAvailable:\s+(\d+) kB", _text("/proc/meminfo"))
    free = [total] if found is None else [total, 1024 * int(found[1])]
    limits = (_text(f"/sys/fs/cgroup/{name}").strip() for name in _CGROUP_LIMITS)
    free += [int(limit) for limit in limits if limit.isdecimal()]  # not "max"
    return DeviceMemory(min(free), total)


def return_freed_memory() -> None:
    """Gives what was freed back to the system, where the C library (glibc) would keep it.

    Of what is in use nothing moves. Takes 0.1 ms where a few MB were freed.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))


class Device:
    """A CPU."""

    is_cuda = False
    captures_on_demand = True  # a capture does the work: the first step of a size can be one

    def __init__(self) -> None:
        self.torch = torch.device("cpu")
        self.compilations = mk.Compilations()
        self._results = mk.BufferPool()  # of kernels, in captured steps and others

    @property
    def name(self) -> str:
        """What a log line calls it."""
        return "cpu"

    def activate(self) -> None:
        """Makes it the device on which this thread launches work."""

    def watch_compiler(self, *, serving: bool = False) -> AbstractContextManager[Any]:
        """Within, kernels that are compiled count in `compilations`; a CPU's all are compiled."""
        return contextlib.nullcontext()

    def row_bounds(self) -> Sequence[int]:
        """Row counts beyond each of which kernels are compiled anew, rising."""
        return ()

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

    def capture(self, work: Callable[[], Tensor]) -> CapturedGraph:
        """Keeps the work for replay; here it is done as well. It may use fixed buffers only."""
        return CpuGraph(work, self._results)

    def end_captures(self) -> None:
        """Ends the captures of this thread that an exception kept from ending."""
        end_captures()

    def scratch(self) -> AbstractContextManager[Any]:
        """Within, kernels put results where those of earlier steps were: use them in this step."""
        return mk.results_in(self._results)

    def synchronize(self) -> None:
        """Waits for all work."""

    def memory(self) -> DeviceMemory | None:
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


@dataclass(frozen=True, slots=True)
class _Here:
    tensors: list[Tensor]

    def wait(self) -> list[Tensor]:
        return self.tensors


def _nothing() -> None:
    pass


def _text(path: str) -> str:
    """What a file of the system says; nothing where there is none."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""
