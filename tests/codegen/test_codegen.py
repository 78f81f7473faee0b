"""`testing.codegen` tells what the machine code is: faults that only a profiler would show."""

from __future__ import annotations

import contextlib

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.driver import driver
from triton.runtime.errors import OutOfResources

from multilora_kernels.testing.codegen import Launch, compiling

ARCHS = (80, 90, 100)


@triton.jit
def _matmul(
    out_ptr, a_ptr, b_ptr, K, stride_a, stride_b, stride_out,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, K, BLOCK_K):
        a = tl.load(a_ptr + offs_m[:, None] * stride_a + k + offs_k[None])
        b = tl.load(b_ptr + (k + offs_k)[:, None] * stride_b + offs_n[None])
        acc = tl.dot(a, b, acc)
    out = out_ptr + offs_m[:, None] * stride_out + offs_n[None]
    tl.store(out, acc.to(out_ptr.dtype.element_ty))


def matmul(a: Tensor, b: Tensor, rows: int, warps: int = 4, stages: int = 3) -> None:
    """Ordinary launch code, as it would run on a GPU."""
    out = torch.empty(len(a), b.shape[1], dtype=a.dtype)
    grid = (len(a) // rows, b.shape[1] // 128)
    _matmul[grid](
        out, a, b, a.shape[1], a.stride(0), b.stride(0), out.stride(0), rows, 128, 64,
        num_warps=warps, num_stages=stages, enable_fp_fusion=True,
    )  # fmt: skip


def compiled(arch: int, rows: int = 64, k: int = 256, offset: int = 0, **options: int) -> Launch:
    a = torch.zeros(128 * k + offset, dtype=torch.bfloat16)[offset:].view(128, k)
    with compiling(arch) as launches:
        matmul(a, torch.zeros(k, 256, dtype=torch.bfloat16), rows, **options)
    (launch,) = launches
    return launch


@pytest.mark.parametrize("arch", ARCHS)
def test_a_launch_is_recorded(arch: int) -> None:
    launch = compiled(arch)
    assert (launch.kernel, launch.arch, launch.grid) == ("_matmul", arch, (2, 2, 1))
    assert (launch.num_warps, launch.num_stages) == (4, 3)
    assert 32 <= launch.registers <= 255
    assert launch.shared_bytes > 0
    assert launch.spills == launch.stack_bytes == 0
    assert launch.accesses["LDGSTS", 16] > 0
    assert "EXIT" in launch.sass


@pytest.mark.parametrize(
    ("arch", "rows", "mma"),
    [(80, 64, "HMMA"), (90, 64, "HGMMA"), (90, 16, "HMMA"), (100, 16, "HMMA")],
)
def test_the_matrix_instruction(arch: int, rows: int, mma: str) -> None:
    """Hopper's wgmma needs 64 rows for its four warps."""
    assert compiled(arch, rows).mma == {mma}


def test_sm_100_has_an_instruction_of_its_own() -> None:
    assert compiled(100, 128).mma == {"UTCHMMA"}


def test_alignment_is_specialised_as_on_a_gpu() -> None:
    """An odd row length makes loads of two bytes, which the next test would not miss."""
    assert compiled(90).narrow("LDG", "LDGSTS", "STG") == 0
    odd = compiled(90, k=250)  # 500 bytes a row: 4 divides it, 16 does not
    assert odd.narrow("LDG", "LDGSTS") > 0
    shifted = compiled(90, offset=1)
    assert shifted.narrow("LDG", "LDGSTS") > 0


def test_spilled_registers_show() -> None:
    """A tile of 128 x 128 sums in one warp's registers cannot fit."""
    launch = compiled(80, rows=128, warps=1)
    assert launch.registers == 255
    assert launch.spills > 0
    assert launch.stack_bytes > 0


def test_too_much_shared_memory_raises() -> None:
    with pytest.raises(OutOfResources, match="shared memory"):
        compiled(80, rows=128, stages=8)


def test_every_launch_is_recorded_though_code_is_kept() -> None:
    a = torch.zeros(128, 256, dtype=torch.bfloat16)
    b = torch.zeros(256, 256, dtype=torch.bfloat16)
    with compiling(90) as first:
        matmul(a, b, 64)
        matmul(a, b, 64)
    with compiling(90) as second:
        matmul(a, b, 16)
    assert [launch.grid for launch in first] == [(2, 2, 1)] * 2
    assert [launch.grid for launch in second] == [(8, 2, 1)]


def test_the_driver_of_before_is_back() -> None:
    before = driver._active
    with contextlib.suppress(KeyError), compiling(90):
        assert driver.active.get_current_target().arch == 90
        raise KeyError
    assert driver._active is before


def test_an_unknown_architecture_is_refused() -> None:
    with pytest.raises(ValueError, match="arch 70 is none of 80"), compiling(70):
        pass


def test_interpreter_mode_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"), compiling(90):
        pass
