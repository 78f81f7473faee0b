"""What the kernel of trained columns compiles to: matrix instructions, nothing spills."""

from __future__ import annotations

import pytest
import torch

from multilora_kernels import Columns, make_tiles
from multilora_kernels.cuda import lora_columns
from multilora_kernels.testing.codegen import compiling


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_columns_of_a_head_of_llama_8b(arch: int) -> None:
    y, x = (torch.empty(16, n, dtype=torch.bfloat16) for n in (128256, 4096))
    ids, counts = torch.zeros(8, 256, dtype=torch.int32), torch.zeros(8, dtype=torch.int32)
    changes = Columns(ids, counts, torch.empty(8, 256, 4096, dtype=torch.bfloat16))
    with compiling(arch) as launches:
        lora_columns.lora_columns_(y, x, changes, make_tiles([0] * 16, 16))
    (launch,) = launches
    assert launch.spills == 0
    assert launch.mma == {"HMMA"}
    assert launch.registers <= 128
    assert {size for (name, size) in launch.accesses if name == "LDGSTS"} == {16}
