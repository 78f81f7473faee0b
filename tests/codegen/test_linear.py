"""What the batch-invariant product compiles to, for every schedule that a row count chooses."""

from __future__ import annotations

import pytest
import torch

from multilora_kernels.cuda import linear
from multilora_kernels.testing.codegen import compiling

MMA = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
# Rows -> registers, KiB of shared memory, at most.
TABLE = {1: (80, 64), 128: (184, 100), 512: (200, 130)}


@pytest.mark.parametrize("rows", TABLE)
@pytest.mark.parametrize("arch", MMA)
def test_code(arch: int, rows: int) -> None:
    registers, shared = TABLE[rows]
    x, weight = torch.zeros(rows, 4096), torch.zeros(6144, 4096)
    with compiling(arch) as found:
        linear.matmul(x.bfloat16(), weight.bfloat16())
    (launch,) = found
    assert launch.mma == {MMA[arch]}  # one family for one row and for many
    assert launch.spills == launch.stack_bytes == 0
    assert launch.registers <= registers, launch
    assert launch.shared_bytes <= shared * 1024, launch
    assert launch.narrow("LDG", "STG", "LDGSTS", below=16) == 0, launch.accesses
