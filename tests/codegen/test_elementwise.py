"""What the elementwise kernels compile to: 16 bytes at a time, nothing spills."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

from multilora_kernels.cuda import elementwise
from multilora_kernels.testing.codegen import Launch, compiling

if TYPE_CHECKING:
    from collections.abc import Callable

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn


def norm(hidden: int) -> None:
    x = torch.zeros(8, hidden, dtype=BF16)
    elementwise.rms_norm(x, x[0].clone(), 1e-5, torch.zeros_like(x))


def own_norm(hidden: int) -> None:
    x = torch.zeros(8, hidden, dtype=BF16)
    change, row = torch.zeros(4, hidden), torch.zeros(8, dtype=torch.int32)
    elementwise.rms_norm(x, x[0].clone(), 1e-5, torch.zeros_like(x), change, row)


def silu(inter: int) -> None:
    elementwise.silu_mul(torch.zeros(8, 2 * inter, dtype=BF16))


def rope(kv_dtype: torch.dtype) -> None:
    q, k, v = torch.zeros(8, 48, 128, dtype=BF16).split((32, 8, 8), 1)
    k_blocks, v_blocks = torch.zeros(2, 64, 16, 8, 128).to(kv_dtype)
    angles, index = torch.zeros(8192, 64), torch.zeros(8, dtype=torch.int64)
    scales: list[Tensor | None] = [torch.ones(8)] * 2 if kv_dtype == FP8 else [None, None]
    elementwise.rope_store_kv_(q, k, v, angles, angles, index, index, k_blocks, v_blocks, *scales)


# Name -> the call, registers at most, bytes of the narrowest store, architectures.
TABLE: dict[str, tuple[Callable[[], object], int, int, tuple[int, ...]]] = {
    "norm 4096": (lambda: norm(4096), 64, 16, (80, 90, 100)),
    "norm 16384": (lambda: norm(16384), 80, 16, (90,)),
    "a norm of its own 4096": (lambda: own_norm(4096), 80, 16, (80, 90, 100)),
    "silu": (
        lambda: elementwise.silu_mul(torch.zeros(8, 28672, dtype=BF16)),
        40,
        16,
        (80, 90, 100),
    ),
    "rope": (lambda: rope(BF16), 64, 16, (80, 90, 100)),
    "rope e4m3": (lambda: rope(FP8), 80, 8, (90, 100)),
}


def only(call: Callable[[], object], arch: int) -> Launch:
    with compiling(arch) as found:
        call()
    (launch,) = found
    return launch


@pytest.mark.parametrize(
    ("name", "arch"), [(name, arch) for name, row in TABLE.items() for arch in row[3]]
)
def test_code(name: str, arch: int) -> None:
    call, registers, store, _ = TABLE[name]
    launch = only(call, arch)
    assert launch.spills == launch.stack_bytes == 0
    assert launch.registers <= registers, launch
    assert launch.narrow("LDG", "STG") == 0, launch.accesses
    assert launch.narrow("STG", below=store) == 0, launch.accesses
    # What is narrower than 16 bytes is a position, a slot or a scale.
    assert launch.narrow("LDG", below=16) <= 8, launch.accesses
    assert launch.accesses["LDG", 16] > 1, launch.accesses
