"""What the compiler makes of a launch, on a machine without a GPU.

Under `compiling` the project's ordinary launch code runs on CPU tensors: each `kernel[grid](...)`
is specialised as on the GPU (alignment of pointers, integers divisible by 16 or equal to 1, None),
compiled for the chosen architecture, recorded and not run. Triton's wheel holds the assembler and
the disassembler that this needs.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

SHARED_BYTES = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
"""Shared memory that a block may have, by architecture; a launch that wants more raises."""

_BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_INSTRUCTION = re.compile(
    r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)((?:\.[A-Z0-9_]+)*)", re.MULTILINE
)
_MMA = re.compile(r"\w*(MMA|GMMA)")
_MEMORY = ("LDG", "STG", "LDGSTS", "RED", "ATOMG", "LDS", "STS")
_WIDTHS = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}


@dataclass(frozen=True)
class Launch:
    """One launch and the machine code that it would run."""

    kernel: str
    arch: int
    grid: tuple[int, int, int]
    num_warps: int
    num_stages: int
    shared_bytes: int  # a block
    registers: int  # a thread
    stack_bytes: int  # a thread; spilled registers lie there
    ops: Counter[str] = field(repr=False)  # instructions by name, e.g. HMMA, HGMMA, LDGSTS
    accesses: Counter[tuple[str, int]]  # memory instructions by (name, bytes a thread)
    sass: str = field(repr=False)  # the disassembly

    @property
    def spills(self) -> int:
        """Loads and stores of spilled registers."""
        return self.ops["LDL"] + self.ops["STL"]

    @property
    def mma(self) -> set[str]:
        """The matrix instructions: HMMA (a warp), HGMMA (Hopper, four warps), UTCHMMA (sm_100)."""
        return {name for name in self.ops if _MMA.fullmatch(name)}

    def narrow(self, *names: str, below: int = 4) -> int:
        """How many of the memory instructions `names` move fewer than `below` bytes a thread."""
        return sum(
            count for (name, size), count in self.accesses.items() if name in names and size < below
        )


@contextmanager
def compiling(arch: int = 90) -> Iterator[list[Launch]]:
    """Compiles every launch inside the block for sm_`arch`; the list grows as they happen.

    RuntimeError in interpreter mode, where nothing can be compiled.
    """
    refuse_interpreter()
    before = driver._active
    stub = StubDriver(arch)
    driver.set_active(stub)
    try:
        yield stub.launches
    finally:
        driver._active = before


def refuse_interpreter() -> None:
    """RuntimeError in interpreter mode, where nothing can be compiled."""
    if os.environ.get("TRITON_INTERPRET", "") not in ("", "0"):
        raise RuntimeError("TRITON_INTERPRET is set: compile in a process without it")


@dataclass(frozen=True)
class _Code:
    registers: int
    stack_bytes: int
    ops: Counter[str]
    accesses: Counter[tuple[str, int]]
    sass: str


@cache
def _read(cubin: bytes) -> _Code:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        sass = _tool("nvdisasm", "-c", file.name)
    sizes = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if sizes is None:
        raise RuntimeError(f"cuobjdump tells no registers: {usage}")
    ops: Counter[str] = Counter()
    accesses: Counter[tuple[str, int]] = Counter()
    for name, modifiers in _INSTRUCTION.findall(sass):
        ops[name] += 1
        if name in _MEMORY:
            sized = [_WIDTHS[m] for m in modifiers.split(".") if m in _WIDTHS]
            accesses[name, sized[-1] if sized else 4] += 1
    return _Code(int(sizes[1]), int(sizes[2]), ops, accesses, sass)


def _tool(name: str, *arguments: str) -> str:
    command = [str(_BINARIES / name), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


class _Utils:
    """Triton asks this for the device's limits and to load machine code."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED_BYTES[self.arch], "multiprocessor_count": 132}

    def load_binary(self, name: str, cubin: bytes, shared: int, device: int) -> tuple[Any, ...]:
        code = _read(cubin)
        return 1, code, code.registers, code.stack_bytes // 4, 1024

    def unload_module(self, module: Any) -> None:
        """Nothing was loaded."""


class _Launcher:
    """Stands where Triton builds the C function that launches."""

    launch_cooperative_grid = False

    def __init__(self, src: Any, metadata: Any) -> None:
        self.metadata = metadata

    def __call__(self, x: int, y: int, z: int, stream: int, code: _Code, *rest: Any) -> None:
        found = self.metadata
        # A compiled kernel outlives the block that compiled it: the present one's list counts.
        driver.active.launches.append(
            Launch(
                kernel=found.name,
                arch=found.target.arch,
                grid=(x, y, z),
                num_warps=found.num_warps,
                num_stages=found.num_stages,
                shared_bytes=found.shared,
                **vars(code),
            )
        )


class StubDriver:
    """A driver whose device compiles and does not run. Its device number is the architecture, so
    that code for two architectures, or for a real device, is never mixed up in Triton's caches."""

    launcher_cls, binary_ext = _Launcher, "cubin"

    def __init__(self, arch: int) -> None:
        if arch not in SHARED_BYTES:
            raise ValueError(f"arch {arch} is none of {', '.join(map(str, SHARED_BYTES))}")
        self.arch, self.utils = arch, _Utils(arch)
        self.launches: list[Launch] = []

    def get_current_target(self) -> Any:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch

    def set_current_device(self, device: int) -> None:
        """There is only one."""

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_device_capability(self, device: int = 0) -> tuple[int, int]:
        return divmod(self.arch, 10)
