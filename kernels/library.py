"""The `multilora` operator library of torch: define once, implement per device.

Plain `torch.library.Library`, not `@custom_op`, whose call costs some ten times as much. Both
functions skip what is already there, so that the package may be imported under two names.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "multilora"
_library: Any = torch.library  # torch gives its methods no types
_FRAGMENT = _library.Library(NAMESPACE, "FRAGMENT")


def define(schema: str) -> Any:
    """Defines an op, e.g. `"silu_mul(Tensor x) -> Tensor"`, and returns its `.default` overload."""
    name = schema.split("(", 1)[0]
    if not hasattr(getattr(torch.ops, NAMESPACE), name):
        _FRAGMENT.define(schema, tags=(torch.Tag.needs_fixed_stride_order,))
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def implement(name: str, key: str, function: Callable[..., Any]) -> None:
    """Registers `function` as what op `name` does for a dispatch key such as "CPU" or "Meta"."""
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", key):
        _FRAGMENT.impl(name, function, key)
