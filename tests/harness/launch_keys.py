"""Which launches of Triton kernels a GPU would have to compile first, seen in the interpreter.

Triton compiles a variant of a kernel for each new combination of the arguments' types, constants
and options, and for pointers and integers also of what it specialises on: divisible by 16, equal
to 1. A launch with a combination that was not seen before in this process is a new key.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable


def on_new_key(tell: Callable[[str], None]) -> None:
    """From now on calls `tell` with the kernel's name at each launch with a new key."""
    from triton.runtime.interpreter import InterpretedFunction

    seen: set[Any] = set()
    run = InterpretedFunction.run

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        key = key_of(self, args, kwargs)
        if key not in seen:
            seen.add(key)
            tell(self.fn.__name__)
        return run(self, *args, **kwargs)

    InterpretedFunction.run = watched


def key_of(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What Triton would look a compiled kernel up by; the grid is no part of it."""
    parameters = inspect.signature(function.fn).parameters
    plain = function.kwargs.get("do_not_specialize") or ()
    given = dict(zip(parameters, args, strict=False)) | kwargs
    found: list[Any] = [function.fn]
    for i, (name, value) in enumerate(given.items()):
        if name in ("grid", "warmup"):
            continue
        annotation = str(getattr(parameters.get(name), "annotation", "option"))
        constant = name not in parameters or "constexpr" in annotation
        specialised = name not in plain and i not in plain
        found.append((name, value if constant else _kind(value, specialised)))
    return tuple(found)


def _kind(value: Any, specialised: bool) -> Any:
    if isinstance(value, torch.Tensor):
        return "tensor", value.dtype, specialised and value.data_ptr() % 16 == 0
    if isinstance(value, tuple):
        return tuple(_kind(part, specialised) for part in value)
    if isinstance(value, bool) or not isinstance(value, int):
        return value if value is None else type(value)
    if specialised and value == 1:
        return 1
    return "int", -(2**31) <= value < 2**31, specialised and value % 16 == 0
