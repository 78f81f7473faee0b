"""Products with a weight, plain or packed."""

from __future__ import annotations

from torch import Tensor

from ..cpu import linear as cpu
from ..cuda import dispatch as cuda
from ..library import register
from ..packed_weight import PackedWeight
from .arguments import check, refuse_gradients


def linear(
    x: Tensor,  # [tokens, in]
    weight: Tensor | PackedWeight,  # [out, in]; one that is not packed has x's dtype
    bias: Tensor | None = None,  # [out], of x's dtype
    batch_invariant: bool = False,
) -> Tensor:  # [tokens, out], of x's dtype
    """`x @ weight.T + bias`, of a weight packed or not.

    With `batch_invariant` a row's bits do not depend on the number of rows; on CPU they never do.
    ValueError for shapes that disagree and a bias of another dtype. Packed weights are for CPU:
    NoCudaKernel on CUDA.
    """
    if isinstance(weight, PackedWeight):
        refuse_gradients(x, weight.data, weight.scales, bias)
        check(x.dim() == 2, "x must be [tokens, in]")
        _check(x, weight.out, weight.in_, bias)
        packed_y: Tensor = _PACKED(x, *weight, bias)
        return packed_y
    refuse_gradients(x, weight, bias)
    check(weight.dim() == 2, "weight must be [out, in]")
    _check(x, weight.shape[0], weight.shape[1], bias)
    y: Tensor = _LINEAR(x, weight, bias, batch_invariant)
    return y


def _check(x: Tensor, out: int, in_: int, bias: Tensor | None) -> None:
    check(x.shape[-1] == in_, f"x has {x.shape[-1]} columns, weight {in_}")
    if bias is not None:
        fits = bias.shape == (out,) and bias.dtype == x.dtype
        check(fits, f"bias must be [{out}] of {x.dtype}, not {list(bias.shape)} of {bias.dtype}")


def _product(
    x: Tensor, weight: Tensor, bias: Tensor | None, batch_invariant: bool = False
) -> Tensor:
    return x.new_empty((*x.shape[:-1], len(weight)))


def _packed_product(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    return x.new_empty((len(x), weight.out))


_LINEAR = register(
    "linear(Tensor x, Tensor weight, Tensor? bias, bool batch_invariant=False) -> Tensor",
    cpu=cpu.linear,
    cuda=cuda.linear,
    meta=_product,
)
_PACKED = register(
    "linear_packed(Tensor x, PackedWeight weight, Tensor? bias) -> Tensor",
    PackedWeight,
    cpu=cpu.linear_packed,
    cuda=cuda.linear_packed,
    meta=_packed_product,
)
