"""What the token mask compiles to."""

from __future__ import annotations

import torch

from multilora_kernels.cuda import sampling
from multilora_kernels.testing.codegen import compiling


def test_the_token_mask_writes_only() -> None:
    """Logits are not read: -inf goes where a bit is 0."""
    mask = torch.zeros(8, 4008, dtype=torch.int32)
    with compiling(90) as found:
        sampling.apply_token_mask_(torch.zeros(8, 128_256), mask)
    (launch,) = found
    assert launch.spills == launch.stack_bytes == 0
    assert sum(n for (op, _), n in launch.accesses.items() if op == "LDG") == 16  # words of a tile
