"""Repairs of Triton's CPU interpreter, for triton 3.6 to 3.9.

The stock interpreter keeps bfloat16 as uint16 and computes with those integers: products of
matrices are off by ten orders of magnitude, sums and comparisons are wrong, casts truncate.
`repair` mends that and what else kept kernels from being tested: rounding to fp8, loops with a
bound known only at run time (triton 3.6 with numpy >= 2.4), programmatic dependent launch, bf16
atomics.

Products of matrices and sums run in float64 and are rounded once. So a result does not depend on
which BLAS routine numpy takes for a shape, and bits may be compared between shapes of tiles.
Input precision "tf32" is not imitated.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton.language as tl
from numpy.typing import NDArray
from triton.runtime import interpreter

# Values of these are kept as bits.
_AS_TORCH = {
    tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
}
_BITWISE = (np.bitwise_and, np.bitwise_or, np.bitwise_xor)

Array = NDArray[Any]


def repair() -> None:
    """Mends the interpreter of this process; RuntimeError if triton is not in interpreter mode."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("set TRITON_INTERPRET=1 before triton is imported")
    builder = interpreter.interpreter_builder
    if isinstance(builder, RepairedBuilder):
        return
    builder.__class__ = RepairedBuilder
    interpreter.ReduceOps = _ReduceOps
    interpreter.ScanOps = _ScanOps
    interpreter._patch_lang_tensor = _with_index(interpreter._patch_lang_tensor)
    _PatchOnce().install()
    _ignore_dependent_launch()


def values_of(handle: Any) -> Array:
    """The numbers behind a handle: float32 for bf16 and fp8, else the array itself."""
    kind = handle.dtype.scalar
    if kind == tl.bfloat16:
        return (np.ascontiguousarray(handle.data).astype(np.uint32) << 16).view(np.float32)
    if kind in _AS_TORCH:
        bits = torch.from_numpy(np.array(handle.data, dtype=np.uint8))
        wide: Array = bits.view(_AS_TORCH[kind]).float().numpy()
        return wide
    return np.asarray(handle.data)


def handle_of(values: Array, kind: Any) -> Any:
    """A handle of a bf16 or fp8 type: rounded to nearest even, fp8 saturated like the GPU's."""
    rounded = np.array(values, dtype=np.float32)
    if kind != tl.bfloat16:
        limit = torch.finfo(_AS_TORCH[kind]).max
        rounded = np.clip(rounded, -limit, limit)
    narrow = torch.from_numpy(np.array(rounded)).to(_AS_TORCH[kind])
    bits = narrow.view(torch.int16 if kind == tl.bfloat16 else torch.uint8).numpy()
    return interpreter.TensorHandle(bits.view(interpreter._get_np_dtype(kind)), kind)


def _is_bf16(*handles: Any) -> bool:
    return any(handle.dtype.scalar == tl.bfloat16 for handle in handles)


class RepairedBuilder(interpreter.InterpreterBuilder):
    """What executes each Triton operation."""

    def get_bf16(self, value: float) -> Any:
        return handle_of(np.array([value]), tl.bfloat16)

    def cast_impl(self, src: Any, dst_type: Any) -> Any:
        source, target = src.dtype.scalar, dst_type.scalar
        if source == target or not {source, target} & _AS_TORCH.keys():
            return super().cast_impl(src, dst_type)
        if target in _AS_TORCH:
            return handle_of(values_of(src), target)
        wide = interpreter.TensorHandle(values_of(src), tl.float32)
        return super().cast_impl(wide, dst_type)

    def create_fp_to_fp(self, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        if {src.dtype.scalar, dst_type.scalar} & _AS_TORCH.keys():
            return self.cast_impl(src, dst_type)
        return super().create_fp_to_fp(src, dst_type, rounding_mode)

    def binary_op(self, lhs: Any, rhs: Any, op: Any) -> Any:
        if _is_bf16(lhs, rhs) and op not in _BITWISE:
            found = op(values_of(lhs), values_of(rhs))
            if found.dtype != np.bool_:
                return handle_of(found, tl.bfloat16)
        else:
            found = super().binary_op(lhs, rhs, op).data
        # Stock, a comparison keeps the type of its operands, and a scalar one is no mask any more
        # once it is broadcast.
        kind = tl.int1 if found.dtype == np.bool_ else lhs.dtype.scalar
        return interpreter.TensorHandle(found, kind)

    def unary_op(self, arg: Any, op: Any) -> Any:
        if not _is_bf16(arg):
            return super().unary_op(arg, op)
        return handle_of(op(values_of(arg)), tl.bfloat16)

    def create_clampf(self, arg: Any, lo: Any, hi: Any, propagate_nans: Any) -> Any:
        if not _is_bf16(arg):
            return super().create_clampf(arg, lo, hi, propagate_nans)
        wide = [interpreter.TensorHandle(values_of(h), tl.float32) for h in (arg, lo, hi)]
        return handle_of(super().create_clampf(*wide, propagate_nans).data, tl.bfloat16)

    def create_fma(self, x: Any, y: Any, z: Any) -> Any:
        if not _is_bf16(x, y, z):
            return super().create_fma(x, y, z)
        x64, y64, z64 = (values_of(h).astype(np.float64) for h in (x, y, z))
        return handle_of(x64 * y64 + z64, tl.bfloat16)

    def create_dot(self, a: Any, b: Any, d: Any, *options: Any) -> Any:
        if not a.dtype.scalar.is_floating():
            return super().create_dot(a, b, d, *options)
        a64, b64, d64 = (values_of(h).astype(np.float64) for h in (a, b, d))
        found = np.matmul(a64, b64) + d64
        if d.dtype.scalar in _AS_TORCH:
            return handle_of(found, d.dtype.scalar)
        return interpreter.TensorHandle(found.astype(d.data.dtype), d.dtype.scalar)

    def create_atomic_rmw(
        self, op: Any, ptr: Any, val: Any, mask: Any, sem: Any, scope: Any
    ) -> Any:
        if not _is_bf16(val):
            return super().create_atomic_rmw(op, ptr, val, mask, sem, scope)
        if op != interpreter._ir.ATOMIC_OP.FADD:
            raise NotImplementedError(f"{op} of bfloat16 in the interpreter: only additions work")
        old = np.zeros(ptr.data.shape, dtype=np.uint16)
        lanes = np.broadcast_to(mask.data, ptr.data.shape)
        # Programs run one after the other, so loads and stores, lane by lane, are atomic.
        for lane in np.argwhere(lanes):
            at = tuple(lane)
            one = interpreter.TensorHandle(np.array([ptr.data[at]]), ptr.dtype)
            before = self.create_load(one, *self._cache_hints())
            added = interpreter.TensorHandle(np.array([val.data[at]]), tl.bfloat16)
            self.create_store(one, self.create_fadd(before, added), *self._cache_hints()[:-1])
            old[at] = before.data[0]
        return interpreter.TensorHandle(old, tl.bfloat16)

    def _cache_hints(self) -> list[Any]:
        """What `create_load` takes after the pointer: triton 3.6 has one hint more than 3.9."""
        count = len(inspect.signature(super().create_load).parameters) - 1
        return [None] * (count - 1) + [False]


class _Widened:
    """Reductions and scans of bf16 run in float32 and are rounded at the end."""

    def apply_impl(self, input: Any) -> Any:
        kinds = [tensor.dtype for tensor in input]
        if tl.bfloat16 not in kinds:
            return super().apply_impl(input)  # type: ignore[misc]
        wide = tuple(
            self.to_tensor(values_of(t.handle), tl.float32) if t.dtype == tl.bfloat16 else t  # type: ignore[attr-defined]
            for t in input
        )
        found = super().apply_impl(wide)  # type: ignore[misc]
        found = found if isinstance(found, list | tuple) else [found]
        return [self._narrow(t, kind) for t, kind in zip(found, kinds, strict=True)]

    def _narrow(self, tensor: Any, kind: Any) -> Any:
        if kind != tl.bfloat16:
            return tensor
        shape = list(tensor.shape)
        type_ = tl.block_type(kind, shape) if shape else kind
        return tl.core.tensor(handle_of(tensor.handle.data, kind), type_)


class _ReduceOps(_Widened, interpreter.ReduceOps):
    def sum(self, input: Any) -> Any:
        if not input.dtype.is_floating():
            return super().sum(input)
        data = input.handle.data.astype(np.float64)
        return self.to_tensor(np.sum(data, axis=self.axis, keepdims=self.keep_dims), input.dtype)


class _ScanOps(_Widened, interpreter.ScanOps):
    pass


def _with_index(patch_tensor: Callable[..., None]) -> Callable[..., None]:
    """Tensors of one element as integers, which `range` asks for."""

    def patch(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.reshape(-1)[0]))

    return patch


class _PatchOnce:
    """Patches `triton.language` once in a launch, not at each call of a device function.

    `tl.zeros`, `tl.sum`, `tl.cdiv` and the like are device functions, and each call of one costs
    the stock interpreter 10 to 20 ms.
    """

    def __init__(self) -> None:
        self.patch, self.call = interpreter._patch_lang, interpreter.GridExecutor.__call__
        self.scopes: list[Any] = []
        self.done: set[int] = set()

    def install(self) -> None:
        def call(executor: Any, *args: Any, **kwargs: Any) -> Any:
            try:
                with np.errstate(all="ignore"):  # a GPU does not warn of an overflow either
                    return self.call(executor, *args, **kwargs)
            finally:
                while self.scopes:
                    self.scopes.pop().restore()
                self.done.clear()

        interpreter._patch_lang = self.patch_lang
        interpreter.GridExecutor.__call__ = call

    def patch_lang(self, fn: Any) -> Any:
        modules = (m for m in fn.__globals__.values() if inspect.ismodule(m))
        seen = {id(m) for m in modules if m in (tl, tl.core)}
        if not seen or not seen <= self.done:
            self.scopes.append(self.patch(fn))
            self.done |= seen
        return _Nothing()


class _Nothing:
    def restore(self) -> None:
        """The launch restores."""


def _ignore_dependent_launch() -> None:
    """Programs run one after the other, so there is nothing to wait for."""
    from triton.language.extra import cuda

    for name in ("gdc_wait", "gdc_launch_dependents"):
        if hasattr(cuda, name):
            setattr(cuda, name, lambda *args, **kwargs: None)
