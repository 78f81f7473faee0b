"""The repaired interpreter computes what a GPU does; stock, most of these tests fail."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

SIZE = 1024
BF16 = torch.bfloat16


def numbers(*shape: int) -> Tensor:
    """float32 over many binary orders, with ties of bf16 rounding, infinities, NaN and zeros."""
    x = torch.randn(shape) * torch.exp2(torch.randint(-20, 20, shape))
    flat = x.view(-1)
    flat[:64] = (torch.arange(64) * 2 + 1).float() * 2.0**-8 + 1  # halfway between two bf16
    flat[64:70] = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0, 3.4e38])
    return x


def assert_same_bits(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@triton.jit
def _cast(out_ptr, x_ptr, SIZE: tl.constexpr):
    offs = tl.arange(0, SIZE)
    x = tl.load(x_ptr + offs)
    tl.store(out_ptr + offs, x.to(out_ptr.dtype.element_ty))


@pytest.mark.parametrize("source", [torch.float32, torch.float16, BF16])
@pytest.mark.parametrize("target", [torch.float32, torch.float16, BF16])
def test_casts_round_to_nearest_even(source: torch.dtype, target: torch.dtype) -> None:
    x, out = numbers(SIZE).to(source), torch.zeros(SIZE, dtype=target)
    _cast[(1,)](out, x, SIZE)
    assert_same_bits(out, x.to(target))


@pytest.mark.parametrize("target", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("source", [torch.float32, BF16])
def test_casts_to_fp8_round_and_saturate(source: torch.dtype, target: torch.dtype) -> None:
    x, out = numbers(SIZE).to(source), torch.zeros(SIZE).to(target)
    x[:512] = torch.randn(512).to(source)  # carries and subnormals
    _cast[(1,)](out, x, SIZE)
    limit = torch.finfo(target).max
    assert_same_bits(out.float(), x.float().clamp(-limit, limit).to(target).float())


@pytest.mark.parametrize("source", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("target", [torch.float32, BF16])
def test_casts_from_fp8_are_exact(source: torch.dtype, target: torch.dtype) -> None:
    x = torch.arange(256).to(torch.uint8).view(source)
    out = torch.zeros(256, dtype=target)
    _cast[(1,)](out, x, 256)
    assert_same_bits(out, x.to(target))


@triton.jit
def _arithmetic(out_ptr, x_ptr, y_ptr, SIZE: tl.constexpr):
    offs = tl.arange(0, SIZE)
    x = tl.load(x_ptr + offs)
    y = tl.load(y_ptr + offs)
    tl.store(out_ptr + offs, x + y)
    tl.store(out_ptr + SIZE + offs, x - y)
    tl.store(out_ptr + 2 * SIZE + offs, x * y)
    tl.store(out_ptr + 3 * SIZE + offs, -x)
    tl.store(out_ptr + 4 * SIZE + offs, tl.abs(x))
    tl.store(out_ptr + 5 * SIZE + offs, tl.where(x < y, x, y))
    tl.store(out_ptr + 6 * SIZE + offs, x + 1.5)


def test_bf16_arithmetic_is_torchs_bit_for_bit() -> None:
    x, y = numbers(SIZE).to(BF16), torch.randn(SIZE).to(BF16)
    x[64:70] = 1  # sign and payload of NaN are nobody's promise
    out = torch.zeros(7, SIZE, dtype=BF16)
    _arithmetic[(1,)](out, x, y, SIZE)
    expected = [x + y, x - y, x * y, -x, x.abs(), torch.where(x < y, x, y), x + 1.5]
    assert_same_bits(out, torch.stack(expected))


@triton.jit
def _scalar_mask(out_ptr, x_ptr, limit_ptr, SIZE: tl.constexpr):
    offs = tl.arange(0, SIZE)
    mask = (tl.load(limit_ptr) > 3) & (offs < 5)
    tl.store(out_ptr + offs, tl.load(x_ptr + offs, mask=mask, other=7), mask=offs < SIZE)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32, BF16])
def test_a_scalar_comparison_is_a_mask(dtype: torch.dtype) -> None:
    x, out = torch.arange(8), torch.zeros(8, dtype=torch.long)
    for limit, expected in ((3, [7] * 8), (4, [0, 1, 2, 3, 4, 7, 7, 7])):
        _scalar_mask[(1,)](out, x, torch.tensor([limit]).to(dtype), 8)
        assert out.tolist() == expected


@triton.jit
def _reduce(sum_ptr, max_ptr, at_ptr, scan_ptr, x_ptr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    offs = rows[:, None] * COLUMNS + columns[None]
    x = tl.load(x_ptr + offs)
    tl.store(sum_ptr + rows, tl.sum(x, 1))
    tl.store(max_ptr + rows, tl.max(x, 1))
    tl.store(at_ptr + rows, tl.argmax(x, 1))
    tl.store(scan_ptr + offs, tl.cumsum(x, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16])
def test_reductions(dtype: torch.dtype) -> None:
    x = torch.randint(-4, 5, (8, 32)).to(dtype)
    sums, tops = torch.zeros(2, 8, dtype=dtype)
    at, scan = torch.zeros(8, dtype=torch.int32), torch.zeros_like(x)
    _reduce[(1,)](sums, tops, at, scan, x, 8, 32)
    assert_same_bits(sums, x.float().sum(1).to(dtype))
    assert_same_bits(tops, x.amax(1))
    assert torch.equal(at.long(), (x == x.amax(1, keepdim=True)).int().argmax(1))
    assert_same_bits(scan, x.float().cumsum(1).to(dtype))


@triton.jit
def _dot(out_ptr, a_ptr, b_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a = tl.load(a_ptr + m[:, None] * K + k[None])
    b = tl.load(b_ptr + k[:, None] * N + n[None])
    tl.store(out_ptr + m[:, None] * N + n[None], tl.dot(a, b))


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, BF16, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_dot_is_the_exact_product_rounded_once(dtype: torch.dtype) -> None:
    a, b = torch.randn(16, 64).to(dtype), torch.randn(64, 32).to(dtype)
    out = torch.zeros(16, 32)
    _dot[(1,)](out, a, b, 16, 32, 64)
    assert_same_bits(out, (a.double() @ b.double()).float())


def test_dot_rows_do_not_depend_on_the_tile() -> None:
    a, b = torch.randn(64, 128), torch.randn(128, 32)
    whole, part = torch.zeros(64, 32), torch.zeros(16, 32)
    _dot[(1,)](whole, a, b, 64, 32, 128)
    _dot[(1,)](part, a[16:32].contiguous(), b, 16, 32, 128)
    assert torch.equal(whole[16:32], part)


@triton.jit
def _loops(out_ptr, count_ptr, limit):
    total = 0
    for i in range(tl.load(count_ptr)):
        total += i
    for i in tl.range(0, limit, 2, num_stages=2):
        total += i
    while total < limit * 10:
        total += 7
    tl.store(out_ptr, total)


def test_loops_with_bounds_known_at_run_time() -> None:
    out, count = torch.zeros(2, dtype=torch.int32)
    count += 5
    _loops[(1,)](out, count, 9)
    assert out == 10 + 20 + 7 * 9  # the first multiple that passes 90


@triton.jit
def _dependent_launch(out_ptr):
    tl.extra.cuda.gdc_wait()
    tl.store(out_ptr, 1.0)
    tl.extra.cuda.gdc_launch_dependents()


def test_programmatic_dependent_launch_does_nothing() -> None:
    out = torch.zeros(1)
    _dependent_launch[(1,)](out)
    assert out == 1


@triton.jit
def _atomic(out_ptr, x_ptr, SIZE: tl.constexpr):
    offs = tl.arange(0, SIZE)
    tl.atomic_add(out_ptr + offs % 2, tl.load(x_ptr + offs), mask=offs < 6)


def test_bf16_atomics_add_lane_by_lane() -> None:
    x, out = torch.randn(8).to(BF16), torch.zeros(2, dtype=BF16)
    _atomic[(1,)](out, x, 8)
    expected = torch.zeros(2, dtype=BF16)
    for i in range(6):
        expected[i % 2] += x[i]
    assert_same_bits(out, expected)


@triton.jit
def _twice(x):
    return tl.zeros([8], tl.float32) + x * 2


@triton.jit
def _calls(out_ptr, COUNT: tl.constexpr):
    for i in tl.static_range(COUNT):
        tl.store(out_ptr + tl.arange(0, 8), _twice(tl.sum(tl.full([4], i, tl.float32))))


def test_the_language_is_patched_once_in_a_launch_and_restored(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from triton.runtime import interpreter

    patched: list[Any] = []
    builtin = interpreter._patch_builtin
    monkeypatch.setattr(
        interpreter, "_patch_builtin", lambda *a: (patched.append(a[0]), builtin(*a))
    )
    before, out = tl.load, torch.zeros(8)
    _calls[(3,)](out, 4)
    assert (out == 24).all()
    assert tl.load is before
    assert patched.count(tl) <= 2  # by `tl` and, within triton's own library, by `tl.core`
