"""Which variants of kernels some code needs, without a GPU and without compiling any.

Triton compiles a kernel anew for other constants, types, alignments and kinds of integers. Under
`recording` the project's ordinary launch code runs on CPU tensors: Triton specialises each launch
as on the GPU, takes it for compiled, and runs nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import triton
from triton.knobs import runtime
from triton.runtime.driver import driver

from .codegen import StubDriver, refuse_interpreter


class Key(NamedTuple):
    """What Triton looks a compiled kernel up by."""

    kernel: str
    specialisation: str


class Compiler(triton.AsyncCompileMode):
    """Stands where Triton hands compilations to an executor, and takes each for done."""

    def __init__(self) -> None:
        super().__init__(None)

    def submit(self, key: str, compile: Callable[[], Any], finalize: Any, *cleanup: Any) -> Any:
        """A kernel that does nothing; `compile()` would give the one that was asked for."""
        finalize(_IDLE)
        return _IDLE


@contextmanager
def recording(arch: int = 90, compiler: Compiler | None = None) -> Iterator[list[Key]]:
    """Keeps the key of each variant that sm_`arch` would compile; the list grows as they come.

    Each block begins with nothing compiled. What stands in `triton.knobs.runtime` as
    `jit_post_compile_hook` is called as after a compilation. RuntimeError in interpreter mode.
    """
    refuse_interpreter()
    keys: list[Key] = []

    def hook(*, key: str, fn: Any, **_: Any) -> None:
        keys.append(Key(fn.name, key))

    before = driver._active, runtime.jit_cache_hook
    driver.set_active(_Device(arch))
    runtime.jit_cache_hook = hook
    try:
        with compiler or Compiler():
            yield keys
    finally:
        driver._active, runtime.jit_cache_hook = before


class _Device(StubDriver):
    """One that no kernel was compiled for yet."""

    numbers = itertools.count(1000)

    def __init__(self, arch: int) -> None:
        super().__init__(arch)
        self.number = next(self.numbers)

    def get_current_device(self) -> int:
        return self.number


class _Idle:
    """A compiled kernel that does nothing."""

    function = packed_metadata = None

    def launch_metadata(self, *_: Any) -> None:
        """There is nothing to tell."""

    def run(self, *_: Any) -> None:
        """There is nothing to do."""


_IDLE = _Idle()
