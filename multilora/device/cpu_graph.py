"""A captured graph on a CPU: the operators that some work called, to call again on the same memory.

Of our own operators the calls of the C++ library are kept, and made again by one call for all of
them in a row: no Python, no dispatcher, no allocation. What they made lies in a pool, where later
results take the place of what nobody needs, at a replay as at the capture.

As with a CUDA graph, Python runs at the capture alone: sizes, branches and numbers that the work
took from the host stay as they were, only what its buffers hold may change. And as there, work
that looks at a tensor's value on the host, or whose shapes depend on one, cannot be captured.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _get_current_dispatch_mode,
    _pop_mode,
)
from torch.utils._pytree import tree_leaves

import multilora_kernels as mk

_HOST_READS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::item")


@dataclass(frozen=True, slots=True)
class _Call:
    """One operator that was called, and the new tensors that came of it."""

    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    made: list[tuple[int, Tensor]]  # by place among the results

    def run(self) -> None:
        """Calls it once more; what it makes goes where it went at first."""
        found = _tensors(self.function(*self.args, **self.kwargs))
        for i, tensor in self.made:
            tensor.copy_(found[i])


def end_captures() -> None:
    """Ends what an exception kept a capture of this thread from ending, raised as it ended.

    An exception in the work itself leaves nothing to end.
    """
    while isinstance(_get_current_dispatch_mode(), _Recorder):
        _pop_mode()
    mk.end_captures()


class CpuGraph:
    """The operators of `work`, in order, done once. A pool may serve many, one at a time."""

    def __init__(self, work: Callable[[], Tensor], pool: mk.BufferPool | None = None) -> None:
        pool = pool or mk.BufferPool()
        with mk.capture(pool) as captured, _Recorder(captured) as recorder:
            output = work()
        self._steps = recorder.steps()
        self._inputs = recorder.inputs  # they stay alive
        self.output = pool.borrow(output) if pool.owns(output) else output

    def replay(self) -> None:
        """Calls every operator again. The output is valid until the pool's next use.

        Who is in inference mode does not enter it once more: an interrupt on the way out of the
        inner one could leave the thread in it for good.
        """
        is_in = torch.is_inference_mode_enabled()
        with nullcontext() if is_in else torch.inference_mode():
            for step in self._steps:
                step.run()

    def sequences(self) -> list[mk.KernelSequence]:
        """The calls of the C++ library, in rows without anything between."""
        return [step for step in self._steps if isinstance(step, mk.KernelSequence)]

    def __len__(self) -> int:
        return len(self._steps)


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, capture: mk.Capture) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.inputs: dict[int, Tensor] = {}  # by memory: what the C++ library reads from outside
        self._capture = capture
        self._steps: list[_Call | list[mk.KernelCall]] = []  # calls of the C++ library row by row

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Else torch imports all of its compiler at the first capture: 900 modules, 1.4 s."""
        return False

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
        calls = self._capture.take()
        given = {_memory(t): t for t in _tensors((args, kwargs))}
        made = [(i, t) for i, t in enumerate(_tensors(found)) if _memory(t) not in given]
        known = given.keys() | {_memory(t) for _, t in made}
        if calls and all(_memory(t) in known for call in calls for t in call.tensors):
            self._add(calls)
            self.inputs |= {at: t for at, t in given.items() if not self._capture.pool.owns(t)}
        # What made nothing and changed nothing was a view, which still stands.
        elif made or func._schema.is_mutable:
            self._steps.append(_Call(func, args, kwargs, made))
        return found

    def _add(self, calls: list[mk.KernelCall]) -> None:
        """Without their tensors, whose memory is to go back to the pool."""
        if not self._steps or isinstance(self._steps[-1], _Call):
            self._steps.append([])
        row = self._steps[-1]
        assert isinstance(row, list)
        row += [call._replace(tensors=()) for call in calls]

    def steps(self) -> list[_Call | mk.KernelSequence]:
        """What was called, in order."""
        return [mk.KernelSequence(step) if isinstance(step, list) else step for step in self._steps]


def _reads_on_host(name: str, args: tuple[Any, ...]) -> bool:
    by_mask = name == "aten::index" and any(t.dtype == torch.bool for t in _tensors(args[1]))
    return name in _HOST_READS or by_mask


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
