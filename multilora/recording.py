"""A captured graph on a CPU: the operators that some work called, to call again on the same memory.

As with a CUDA graph, Python runs at the capture alone: sizes, branches and numbers that the work
took from the host stay as they were, only what its buffers hold may change. And as there, work
that looks at a tensor's value on the host, or whose shapes depend on one, cannot be captured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_HOST_READS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::item")


@dataclass(frozen=True, slots=True)
class _Call:
    """One operator that was called, and the new tensors that came of it."""

    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    made: list[tuple[int, Tensor]]  # by place among the results

    def again(self) -> None:
        """Calls it once more; what it makes goes where it went at first."""
        found = _tensors(self.function(*self.args, **self.kwargs))
        for i, tensor in self.made:
            tensor.copy_(found[i])


class Recording:
    """The operators of `work`, in order. Everything that they made stays alive."""

    def __init__(self, work: Callable[[], Tensor]) -> None:
        recorder = _Recorder()
        with recorder:
            self.output = work()
        self._calls = recorder.calls

    def replay(self) -> None:
        """Calls every operator again."""
        with torch.inference_mode():
            for call in self._calls:
                call.again()

    def __len__(self) -> int:
        return len(self._calls)


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[_Call] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if _reads_on_host(func.name().partition(".")[0], args):
            raise RuntimeError(f"{func.name()} reads a value on the host: that cannot be captured")
        found = func(*args, **kwargs)
        given = {_memory(t) for t in _tensors((args, kwargs))}
        made = [(i, t) for i, t in enumerate(_tensors(found)) if _memory(t) not in given]
        # What made nothing and changed nothing was a view, which still stands.
        if made or func._schema.is_mutable:
            self.calls.append(_Call(func, args, kwargs, made))
        return found


def _reads_on_host(name: str, args: tuple[Any, ...]) -> bool:
    by_mask = name == "aten::index" and any(t.dtype == torch.bool for t in _tensors(args[1]))
    return name in _HOST_READS or by_mask


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
