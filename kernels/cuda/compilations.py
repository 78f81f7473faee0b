"""Which variants of our kernels Triton compiles, and whether somebody waited for it.

Triton compiles a kernel when it is first launched with other constants, types, alignments or kinds
of integers than before: seconds in which nothing else runs. Whoever serves launches all variants
beforehand; what is compiled all the same is a mistake of ours, counted and said with its name.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any, NamedTuple

logger = logging.getLogger(__name__)


class Variant(NamedTuple):
    """A kernel, and what it is compiled for."""

    kernel: str
    arguments: str  # constants with their values, others with their types, "/16" where 16 divides


class Compilations:
    """What Triton made ready for one user of the kernels: compiled, or found in its cache."""

    def __init__(self) -> None:
        self.expected: list[Variant] = []
        self.late: list[Variant] = []  # while serving

    @contextmanager
    def watch(self, *, serving: bool = False) -> Iterator[None]:
        """Keeps what this thread's launches in the block compile, and warns of it if `serving`."""
        _listen()
        token = _watched.set((self, serving))
        try:
            yield
        finally:
            _watched.reset(token)

    def _note(self, variant: Variant, serving: bool) -> None:
        if not serving:
            self.expected.append(variant)
            return
        self.late.append(variant)
        logger.warning(
            "Triton compiled %s while requests waited; this variant should have been ready before "
            "the first request, please report it: %s",
            *variant,
        )


_watched: ContextVar[tuple[Compilations, bool] | None] = ContextVar("watched", default=None)


@cache
def _listen() -> None:
    """Has Triton tell what it compiled; there is one place for that in a process."""
    from triton.knobs import runtime

    before = runtime.jit_post_compile_hook

    def hook(**told: Any) -> Any:
        watched = _watched.get()
        if watched is not None:
            compilations, serving = watched
            compilations._note(_variant(told["fn"], told["compile"]), serving)
        return before(**told) if before is not None else None

    runtime.jit_post_compile_hook = hook


def _variant(fn: Any, compiled: Mapping[str, Any]) -> Variant:
    constants, divisible = compiled["constants"], compiled["configs"][0]
    arguments = []
    for i, (name, kind) in enumerate(compiled["signature"].items()):
        if kind == "constexpr":
            arguments.append(f"{name}={constants[i,]}")
        else:
            arguments.append(f"{name}: {kind}{'/16' if divisible.get((i,)) else ''}")
    return Variant(fn.name, ", ".join(arguments))
