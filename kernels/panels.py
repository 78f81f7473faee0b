"""Weights in panels of 32 outputs, as the C++ GEMM reads them: csrc/gemm.inc says why.

A panel holds its 32 outputs input by input: [panels, in, 32]. Two inputs of a column lie together
for bf16, [panels, in / 2, 32, 2], and in one byte for int4, [panels, in / 2, 32], the even input in
the low half, both plus 8. Scales are [groups, panels * 32]. Inputs are padded to an even number and
outputs to whole panels, with zeros.
"""

from __future__ import annotations

from ctypes import byref

import torch
import torch.nn.functional as F
from torch import Tensor

from . import native

OUTPUTS = 32
CHUNK = 1 << 19  # weights that are put in panels at a time
KINDS = {"float32": 0, "bfloat16": 1, "float16": 2, "int8": 3, "int4": 4}


def usable(in_: int, group: int) -> bool:
    """Whether the C++ GEMM is there and can read groups of that many inputs."""
    return native.LIB is not None and (group >= in_ or group in (32, 64, 128))


def make(weight: Tensor, kind: str) -> Tensor:
    """Panels of a weight or of codes, [out, in], for a kind of KINDS.

    A few at a time: that needs no second copy of the weight, and stays in the cache.
    """
    count, inputs = -(-len(weight) // OUTPUTS), -(-weight.shape[1] // 2) * 2
    halves = (inputs // 2, OUTPUTS)
    shape = {"bfloat16": (*halves, 2), "int4": halves}.get(kind, (inputs, OUTPUTS))
    panels = torch.empty(count, *shape, dtype=torch.uint8 if kind == "int4" else weight.dtype)
    step = max(CHUNK // (OUTPUTS * max(inputs, 1)), 1)
    for first in range(0, count, step):
        rows = weight[first * OUTPUTS : (first + step) * OUTPUTS]
        rows = F.pad(rows, (0, inputs - weight.shape[1], 0, -len(rows) % OUTPUTS))
        part = rows.view(-1, OUTPUTS, inputs).transpose(1, 2)
        if kind in ("bfloat16", "int4"):
            part = part.view(-1, inputs // 2, 2, OUTPUTS).transpose(2, 3)
        if kind == "int4":
            codes = (part + 8).view(torch.uint8)
            part = codes[..., 0] | codes[..., 1] << 4
        panels[first : first + step] = part
    return panels


def make_scales(scales: Tensor) -> Tensor:
    """[out, groups] -> [groups, panels * 32]."""
    return F.pad(scales, (0, 0, 0, -len(scales) % OUTPUTS)).T.contiguous()


def rows_of(panels: Tensor, kind: str, in_: int, rows: Tensor) -> Tensor:
    """What `make` was given, of some outputs, int64 [n]: [n, in]."""
    panel, column = rows // OUTPUTS, rows % OUTPUTS
    found = panels[panel, :, column]  # [n, in], or [n, in / 2] and 2 for bf16
    if kind == "int4":
        found = torch.stack((found & 15, found >> 4), -1).to(torch.int8) - 8
    return found.flatten(1)[:, :in_]


def linear(
    x: Tensor,  # [tokens, in], f32, bf16 or f16
    panels: Tensor,
    scales: Tensor | None,  # [groups, panels * 32]
    kind: str,
    out: int,
    group: int,
    bias: Tensor | None,
) -> Tensor:  # [tokens, out]
    """`x @ weight.T + bias`, summed in f32; a row's bits do not depend on the other rows."""
    assert native.LIB is not None
    x = x if x.stride(1) == 1 else x.contiguous()
    y = x.new_empty(len(x), out)
    args = native.GemmArgs(
        y.data_ptr(), x.data_ptr(), panels.data_ptr(),
        None if scales is None else scales.data_ptr(), None if bias is None else bias.data_ptr(),
        out, x.stride(0), group, len(x), x.shape[1], out,
        native.DTYPE_CODES[x.dtype], KINDS[kind], torch.get_num_threads(),
    )  # fmt: skip
    native.LIB.gemm(byref(args))
    return y
