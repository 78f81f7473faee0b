"""The `multilora` operator library of torch: an op's schema and what it does on each device.

Plain `torch.library.Library`, not `@custom_op`, whose call costs some ten times as much. What is
there already is left alone, so that the package may be imported under two names.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

NAMESPACE = "multilora"
_library: Any = torch.library  # torch gives its methods no types
_FRAGMENT = _library.Library(NAMESPACE, "FRAGMENT")

Kernel = Callable[..., Any]

KERNELS: dict[str, dict[str, Kernel]] = {"CPU": {}, "CUDA": {}, "Meta": {}}
"""What torch's dispatcher calls, by dispatch key and op; tensors of a tuple arrive one by one."""

_SCHEMA_TYPES: dict[Any, str] = {Tensor: "Tensor", Tensor | None: "Tensor?", int: "int", str: "str"}


class _Group(NamedTuple):
    """Arguments [start, end) of a schema, which are the fields of a named tuple."""

    start: int
    end: int
    kind: Any


def register(
    schema: str, *tuples: type, cpu: Kernel, cuda: Kernel, meta: Kernel | None = None
) -> Any:
    """Defines an op with what it does on each device, and returns its `.default` overload.

    The schema is torch's, e.g. `"silu_mul(Tensor x) -> Tensor"`, and may also have an argument of a
    given named tuple, or two side by side: `Table table` stands for `Tensor table_page_ids, ...`,
    and the functions get a Table. They have the schema's arguments under its names. `meta` None:
    there is no result.
    """
    schema, groups = _expand(schema, {kind.__name__: kind for kind in tuples})
    name = schema.split("(", 1)[0]
    if not hasattr(getattr(torch.ops, NAMESPACE), name):
        _FRAGMENT.define(schema, tags=(torch.Tag.needs_fixed_stride_order,))
    for key, function in (("CPU", cpu), ("CUDA", cuda), ("Meta", meta or _no_result)):
        function = _gather(function, groups)
        KERNELS[key][name] = function
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", key):
            _FRAGMENT.impl(name, function, key)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def _expand(schema: str, kinds: dict[str, Any]) -> tuple[str, list[_Group]]:
    """The schema with the fields of its named tuples, and where each tuple's fields are."""
    name, _, rest = schema.partition("(")
    listed, _, result = rest.rpartition(") -> ")
    arguments: list[str] = []
    groups: list[_Group] = []
    for argument in listed.split(", "):
        kind, _, own = argument.partition(" ")
        if kind not in kinds:
            arguments.append(argument)
            continue
        fields = get_type_hints(kinds[kind]).items()
        groups.append(_Group(len(arguments), len(arguments) + len(fields), kinds[kind]))
        arguments += [f"{_SCHEMA_TYPES[of]} {own}_{field}" for field, of in fields]
    if len(groups) > 2 or (len(groups) == 2 and groups[0].end != groups[1].start):
        raise ValueError(f"{name}: an op takes one named tuple, or two side by side")
    return f"{name}({', '.join(arguments)}) -> {result}", groups


def _gather(function: Kernel, groups: list[_Group]) -> Kernel:
    """`function` called with the fields of one named tuple, or of two that stand side by side.

    Written out for both, because each call of an op goes through here.
    """
    make = tuple.__new__  # what a named tuple's own does after a call of Python

    @wraps(function)
    def with_one(*args: Any) -> Any:
        return function(*args[:start], make(kind, args[start:end]), *args[end:])

    @wraps(function)
    def with_two(*args: Any) -> Any:
        first, second = make(kind, args[start:end]), make(other, args[end:last])
        return function(*args[:start], first, second, *args[last:])

    if not groups:
        return function
    start, end, kind = groups[0]
    if len(groups) == 1:
        return with_one
    _, last, other = groups[1]
    return with_two


def _no_result(*_: Any) -> None:
    pass
