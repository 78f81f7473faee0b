"""Products with a weight on CPU: packed ones in C++ (linear.inc), plain ones by torch's GEMM."""

from __future__ import annotations

import logging

import torch
import torch.nn.functional as F
from torch import Tensor

from ..packed_weight import FLOATS, PackedWeight, unpack_rows
from . import graph, native, panels
from .row_independence import ROWS

logger = logging.getLogger(__name__)

CHUNK = 1 << 20  # weights that are dequantised at a time


def linear_packed(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """See `reference.linear`: in C++, or with the weight dequantised in parts, in fp32."""
    if weight.in_panels and x.dtype in native.DTYPE_CODES:
        return _cpp_linear(x, weight, bias)
    if weight.kind in FLOATS and weight.data.dtype == x.dtype and not weight.in_panels:
        return linear(x, weight.data, bias)
    wide = x.float()
    y = x.new_empty(len(x), weight.out)
    rows = max(CHUNK // max(weight.in_, 1), 1)
    for first in range(0, weight.out, rows):
        part = torch.arange(first, min(first + rows, weight.out))
        y[:, part] = linear(wide, unpack_rows(weight, part), None).to(x.dtype)
    return y if bias is None else y.add_(bias)


def _cpp_linear(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """Summed in f32; a row's bits do not depend on the other rows."""
    x = x if x.stride(1) == 1 else x.contiguous()
    bias = None if bias is None else bias.contiguous()
    y = graph.empty((len(x), weight.out), x.dtype)
    scales = weight.scales
    args = native.LinearArgs(
        y=y.data_ptr(),
        x=x.data_ptr(),
        packed=weight.data.data_ptr(),
        scales=native.pointer(scales),
        bias=native.pointer(bias),
        y_stride=weight.out,
        x_stride=x.stride(0),
        group=weight.group,
        rows=len(x),
        in_=x.shape[1],
        out=weight.out,
        dtype=native.DTYPE_CODES[x.dtype],
        kind=panels.KINDS[weight.kind],
        num_threads=torch.get_num_threads(),
    )
    graph.call("linear", args, y, x, weight.data, scales, bias)
    return y


def linear(
    x: Tensor,  # [rows, in]; rows are a multiple of 16 where their bits are to be their own
    weight: Tensor,  # [out, in]
    bias: Tensor | None,
    batch_invariant: bool = False,  # on CPU always
) -> Tensor:  # [rows, out]
    """See `reference.linear`."""
    y = _gemm(x, weight)
    return y if bias is None else y.add_(bias)


# What `_rows_stay_apart` said of (dtype, rows, in, out, threads): a fact of the machine.
_APART: dict[tuple[torch.dtype, int, int, int, int], bool] = {}


def _gemm(x: Tensor, weight: Tensor) -> Tensor:
    """x [rows, in] @ weight.T [in, out]: each row's bits are those it has in a block of 16 rows."""
    if len(x) <= ROWS:
        return F.linear(x, weight)
    shape = (x.dtype, len(x), weight.shape[1], len(weight), torch.get_num_threads())
    if shape not in _APART:
        _APART[shape] = _rows_stay_apart(len(x), weight)
        if not _APART[shape]:
            logger.warning("torch's GEMM %s mixes rows on this CPU: it runs 16 at a time", shape)
    return F.linear(x, weight) if _APART[shape] else _by_blocks(x, weight)


def _rows_stay_apart(rows: int, weight: Tensor) -> bool:
    """Whether torch's GEMM of this shape gives what blocks of 16 rows give; tried on noise."""
    noise = torch.randn(rows, weight.shape[1], generator=torch.Generator().manual_seed(rows))
    noise = noise.to(weight.dtype)
    return torch.equal(F.linear(noise, weight), _by_blocks(noise, weight))


def _by_blocks(x: Tensor, weight: Tensor) -> Tensor:
    return torch.cat([F.linear(block, weight) for block in torch.split(x, ROWS)])
