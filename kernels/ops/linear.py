"""Products with a weight, plain or packed."""

from __future__ import annotations

from torch import Tensor

from ..cpu import linear as cpu
from ..cuda import dispatch as cuda
from ..library import register
from ..packed_weight import PackedWeight
from .arguments import check, refuse_gradients


def linear(
    x: Tensor,
    weight: Tensor | PackedWeight,
    bias: Tensor | None = None,
    batch_invariant: bool = False,
) -> Tensor:
    """`x @ weight.T + bias` of x [tokens, in] and a weight [out, in], packed or not.

    With `batch_invariant` a row's bits do not depend on the number of rows; on CPU they never do.
    """
    if isinstance(weight, PackedWeight):
        refuse_gradients(x, weight.data, weight.scales, bias)
        _check_columns(x, weight.in_)
        packed_y: Tensor = _PACKED(x, *weight, bias)
        return packed_y
    refuse_gradients(x, weight, bias)
    _check_columns(x, weight.shape[1])
    y: Tensor = _LINEAR(x, weight, bias, batch_invariant)
    return y


def _check_columns(x: Tensor, columns: int) -> None:
    check(x.shape[-1] == columns, f"x has {x.shape[-1]} columns, weight {columns}")


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
