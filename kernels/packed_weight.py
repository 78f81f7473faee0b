"""Weights in the form in which a linear reads them: packed once, when loaded, maybe quantised.

Quantising is symmetric, in groups of input columns that share one float32 scale:
`weight = code * scale`. With the C++ library, data lies in panels (panels.py), else in rows; that
is decided when packing. What `PackedWeight.data` looks like inside is nobody else's business.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .cpu import panels

BITS = {"int8": 8, "int4": 4}
FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_CHUNK = 1 << 20  # weights that are quantised at a time


class PackedWeight(NamedTuple):
    """A weight [out, in_]. `data` is the weight, int8 codes, or int4 codes, two in a byte."""

    data: Tensor
    scales: Tensor | None  # fp32, one for each output and group; None for float kinds
    kind: str  # "float32", "bfloat16", "float16", "int8" or "int4"
    out: int
    in_: int
    group: int  # input columns that share a scale; in_ = one scale for each output

    @property
    def in_panels(self) -> bool:
        """Whether the C++ GEMM reads it; rows have two dimensions."""
        return self.data.dim() > 2

    @property
    def num_bytes(self) -> int:
        """Bytes of memory, scales included."""
        tensors = [self.data] if self.scales is None else [self.data, self.scales]
        return sum(t.numel() * t.element_size() for t in tensors)


def worth_packing(weight: Tensor) -> bool:
    """Whether a linear reads this floating weight [out, in] faster when it is packed."""
    floats = weight.dtype in FLOATS.values() and weight.device.type == "cpu"
    return floats and panels.usable(weight.shape[1], weight.shape[1])


def pack(weight: Tensor) -> PackedWeight:
    """A floating weight [out, in], packed without loss. ValueError for what is none."""
    kind = str(weight.dtype).removeprefix("torch.")
    if kind not in FLOATS or weight.dim() != 2:
        raise ValueError(f"a weight must be a matrix of {', '.join(FLOATS)}, not {kind}")
    out, in_ = weight.shape
    data = panels.make(weight, kind) if panels.usable(in_, in_) else weight
    return PackedWeight(data, None, kind, out, in_, in_)


def quantize(weight: Tensor, bits: int, group: int | None) -> tuple[Tensor, Tensor]:
    """Codes, int8 [out, in], and scales, fp32 [out, groups], of a floating weight [out, in].

    `group` input columns share a scale, the last group may have fewer; None = all of them. int8
    codes are within +-127 of a scale of max/127. int4 codes are within -8..7: see `_four_bits`.
    A group of zeros has scale 0 and codes 0. ValueError for a weight that is not finite, and for
    other bits and groups.
    """
    out, in_ = weight.shape
    group = in_ if group is None else group
    if bits not in BITS.values() or group < 1:
        raise ValueError(f"bits must be 8 or 4 and a group positive, not {bits} and {group}")
    find = _eight_bits if bits == 8 else _four_bits
    codes = torch.empty(out, in_, dtype=torch.int8)
    scales = torch.empty(out, -(-in_ // group))
    rows = max(_CHUNK // max(in_, 1), 1)
    for first in range(0, out, rows):
        part = weight[first : first + rows].float()
        if not part.isfinite().all():
            raise ValueError("a weight that is infinite or NaN cannot be quantised")
        grouped = F.pad(part, (0, -in_ % group)).view(len(part), -1, group)
        found, scale = find(grouped)
        codes[first : first + rows] = found.flatten(1)[:, :in_]
        scales[first : first + rows] = scale
    return codes, scales


def _eight_bits(groups: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 [out, groups, columns] -> codes of that shape, and scales [out, groups]."""
    scale = _normal(groups.abs().amax(-1) / 127)
    return _codes(groups, scale, -127, 127), scale


def _four_bits(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Like `_eight_bits`; the largest value has code -8, so that scales have both signs.

    Scales that clip it have a smaller squared error, but gave a larger perplexity: outliers matter.
    """
    at = groups.abs().argmax(-1, keepdim=True)
    scale = _normal(groups.gather(-1, at)[..., 0] / -8)
    return _codes(groups, scale, -8, 7), scale


def _normal(scale: Tensor) -> Tensor:
    """0 in place of scales so small that 1 / scale would be infinite."""
    return torch.where(scale.abs() < torch.finfo(torch.float32).tiny, 0.0, scale)


def _codes(groups: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    inverse = torch.where(scale == 0, 0.0, 1 / scale)
    return (groups * inverse[..., None]).round_().clamp_(low, high)


def pack_quantized(
    codes: Tensor,  # int8 [out, in], within -8..7 for 4 bits
    scales: Tensor,  # fp32 [out, groups]
    bits: int,
    group: int | None = None,
) -> PackedWeight:
    """Packs what `quantize` made; `group` None = in / groups, which must be whole.

    ValueError for other bits, and for scales that do not fit.
    """
    out, in_ = codes.shape
    if group is None:
        group = in_ // max(scales.shape[1], 1)
    if scales.shape != (out, -(-in_ // max(group, 1))):
        raise ValueError(f"{list(scales.shape)} scales do not fit {out} x {in_} in groups {group}")
    if bits not in BITS.values():
        raise ValueError(f"bits must be 8 or 4, not {bits}")
    kind = f"int{bits}"
    if panels.usable(in_, group):
        data, scales = panels.make(codes, kind), panels.make_scales(scales)
        return PackedWeight(data, scales, kind, out, in_, group)
    if bits == 8:
        return PackedWeight(codes, scales, kind, out, in_, group)
    nibbles = F.pad(codes, (0, in_ % 2)).view(torch.uint8) & 15  # two's complement
    return PackedWeight(nibbles[:, ::2] | nibbles[:, 1::2] << 4, scales, kind, out, in_, group)


def unpack(packed: PackedWeight) -> Tensor:
    """The weight, fp32 [out, in], that `linear` multiplies by."""
    return unpack_rows(packed, torch.arange(packed.out))


def unpack_rows(packed: PackedWeight, rows: Tensor) -> Tensor:
    """Rows of the weight, fp32 [n, in], chosen by rows int64 [n]: an embedding in a tied head."""
    scales = packed.scales
    if packed.in_panels:
        data = panels.rows_of(packed.data, packed.kind, packed.in_, rows)
        scales = None if scales is None else scales[:, rows].T
    else:
        data = packed.data[rows]
        scales = None if scales is None else scales[rows]
    if scales is None:
        return data.float()
    if packed.kind == "int4" and not packed.in_panels:
        pairs = torch.stack((data << 4, data), -1).view(torch.int8) >> 4  # extends the sign
        data = pairs.flatten(1)[:, : packed.in_]
    return reference.dequantize(data, scales, packed.group)
