"""What keeps rows apart in the torch forms: every row's bits depend on that row alone.

That holds for one machine, build and thread count. What breaks it in torch, as measured (AVX2,
torch 2.13): GEMMs of few rows choose other kernels (so rows come padded to 16), `exp` and `silu`
treat the tail of a flat buffer and the borders between threads by other code (so `flat` feeds them
whole vectors below the size at which torch splits work), and a product with 8 rank rows differs
from the same rows inside 64 (so LoRA goes page by page).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 16
_WHOLE = 64  # elements: torch's elementwise loops take two vectors at a time, of 16 in AVX-512
_SERIAL = 32_768  # elements below which torch's elementwise ops use one thread


def padded(count: int) -> int:
    """The least multiple of ROWS that holds `count` rows."""
    return -(-count // ROWS) * ROWS


def flat(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """An elementwise function, each element by the same vector code wherever it stands in `x`."""
    flat = x.reshape(-1)
    tail = -flat.numel() % _WHOLE
    if tail:
        flat = F.pad(flat, (0, tail))
    parts = [function(part) for part in torch.split(flat, _SERIAL)]
    joined = parts[0] if len(parts) == 1 else torch.cat(parts)
    return joined[: x.numel()].view(x.shape)
