"""Weights in panels of 32 outputs, as the C++ GEMM reads them: csrc/linear_panel.inc says why.

A panel is [steps, 32] words of 32 bits; a word holds some inputs of one output: one of float32, two
of 16 bits, four int8 codes, eight int4 codes. Of int4, inputs 0 2 4 6 are in the low half and
1 3 5 7 in the high one, each half from its lowest four bits up. Codes are two's complement. Scales
are [groups, panels * 32]. Inputs are padded to a multiple of 8 and outputs to whole panels, with
zeros.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import native
from .huge_pages import empty_huge

OUTPUTS = 32
CHUNK = 1 << 19  # weights that are put in panels at a time
KINDS = {"float32": 0, "bfloat16": 1, "float16": 2, "int8": 3, "int4": 4}
IN_WORD = {"float32": 1, "bfloat16": 2, "float16": 2, "int8": 4, "int4": 8}  # inputs

# Where the bytes of an int4 word have which of its inputs: those in low halves, those in high ones.
_LOW, _HIGH = [0, 4, 1, 5], [2, 6, 3, 7]


def usable(in_: int, group: int) -> bool:
    """Whether the C++ GEMM is there and can read groups of that many inputs."""
    return native.LIB is not None and (group >= in_ or group in (32, 64, 128))


def make(weight: Tensor, kind: str) -> Tensor:
    """Panels of a weight or of codes, [out, in], for a kind of KINDS: [panels, steps, 32, parts].

    A few at a time: that needs no second copy of the weight, and stays in the cache.
    """
    count, inputs, size = -(-len(weight) // OUTPUTS), -(-weight.shape[1] // 8) * 8, IN_WORD[kind]
    four_bits = kind == "int4"
    shape = (count, inputs // size, OUTPUTS, size // 2 if four_bits else size)
    panels = empty_huge(shape, torch.uint8 if four_bits else weight.dtype)
    step = max(CHUNK // (OUTPUTS * max(inputs, 1)), 1)
    for first in range(0, count, step):
        rows = weight[first * OUTPUTS : (first + step) * OUTPUTS]
        rows = F.pad(rows, (0, inputs - weight.shape[1], 0, -len(rows) % OUTPUTS))
        part = rows.view(-1, OUTPUTS, inputs // size, size).transpose(1, 2)
        if four_bits:
            codes = part.view(torch.uint8)
            part = codes[..., _LOW] & 15 | codes[..., _HIGH] << 4
        panels[first : first + step] = part
    return panels


def make_scales(scales: Tensor) -> Tensor:
    """[out, groups] -> [groups, panels * 32]."""
    return F.pad(scales, (0, 0, 0, -len(scales) % OUTPUTS)).T.contiguous()


def rows_of(panels: Tensor, kind: str, in_: int, rows: Tensor) -> Tensor:
    """What `make` was given, of some outputs, int64 [n]: [n, in]."""
    found = panels[rows // OUTPUTS, :, rows % OUTPUTS]  # [n, steps, parts]
    if kind == "int4":
        codes = found.new_empty(*found.shape[:2], 8)
        codes[..., _LOW], codes[..., _HIGH] = found << 4, found
        found = codes.view(torch.int8) >> 4  # extends the sign
    return found.flatten(1)[:, :in_]
