"""The elementwise kernels in the interpreter, under the guard, against `reference`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from multilora_kernels import reference
from multilora_kernels.cuda import elementwise
from multilora_kernels.testing.guard import guarded
from tests.harness.kernel_calls.rope import make_rope_call

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
FP8 = torch.float8_e4m3fn
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype)[6:])
rows = pytest.mark.parametrize("rows", [0, 1, 5])


def assert_close(found: Tensor, want: Tensor) -> None:
    assert found.dtype == want.dtype
    tolerance = TOLERANCE.get(found.dtype, 0.0)
    torch.testing.assert_close(found.float(), want.float(), rtol=tolerance, atol=tolerance)


def spread(*shape: int, dtype: torch.dtype) -> Tensor:
    """Random rows with NaN between them."""
    wide = torch.full((shape[0], *shape[1:-1], shape[-1] + 8), torch.nan, dtype=dtype)
    wide[..., : shape[-1]] = torch.randn(shape).to(dtype)
    return wide[..., : shape[-1]]


@rows
@pytest.mark.parametrize("hidden", [1, 33, 512])
@pytest.mark.parametrize("with_residual", [False, True], ids=["alone", "residual"])
@dtypes
def test_rms_norm(dtype: torch.dtype, with_residual: bool, hidden: int, rows: int) -> None:
    x, weight = spread(rows, hidden, dtype=dtype), torch.randn(hidden).to(dtype)
    residual = torch.randn(rows, hidden).to(dtype) if with_residual else None
    want_residual = None if residual is None else residual.clone()
    want = reference.rms_norm(x, weight, 1e-5, want_residual)
    with guarded(order=1):
        found = elementwise.rms_norm(x, weight, 1e-5, residual)
    assert_close(found, want)
    if residual is not None:
        assert want_residual is not None
        assert torch.equal(residual, want_residual)  # one sum, rounded once: the same bits


@rows
@pytest.mark.parametrize("with_residual", [False, True], ids=["alone", "residual"])
@dtypes
def test_a_token_may_have_a_norm_of_its_own(
    dtype: torch.dtype, with_residual: bool, rows: int
) -> None:
    x, weight = spread(rows, 33, dtype=dtype), torch.randn(33).to(dtype)
    residual = torch.randn(rows, 33).to(dtype) if with_residual else None
    change = spread(3, 33, dtype=torch.float32)
    row = torch.tensor([1, -1, 2, 0, -1], dtype=torch.int32)[:rows]
    before = None if residual is None else residual.clone()
    want = reference.rms_norm(x, weight, 1e-5, before, change, row)
    with guarded(order=1):
        found = elementwise.rms_norm(x, weight, 1e-5, residual, change, row)
    assert_close(found, want)


@rows
@pytest.mark.parametrize("inter", [1, 47, 1100])
@dtypes
def test_silu_mul(dtype: torch.dtype, inter: int, rows: int) -> None:
    x = spread(rows, 2 * inter, dtype=dtype)
    with guarded(order=1):
        found = elementwise.silu_mul(x)
    assert_close(found, reference.silu_mul(x))


def check_rope(args: list[Tensor], scales: tuple[Tensor, ...] = ()) -> None:
    want = [t.clone() for t in args]
    reference.rope_store_kv_(*want, *scales)
    with guarded(order=1):
        elementwise.rope_store_kv_(*args, *scales)
    for found, expected in zip(args, want, strict=True):
        # Sums and products only, each rounded where `reference` rounds: the same bits.
        assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 2, 64), (17, 1, 16), (9, 9, 10)])
@dtypes
def test_rope_store_kv(dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int) -> None:
    check_rope(
        [
            t.contiguous()
            for t in make_rope_call(dtype, heads=heads, kv_heads=kv_heads, head_dim=head_dim)
        ]
    )


def test_rope_store_kv_of_a_fused_projection() -> None:
    args = make_rope_call(torch.bfloat16, head_dim=16)
    q = args[0].clone()
    assert not args[0].is_contiguous()
    want = [q, *(t.clone() for t in args[1:])]
    reference.rope_store_kv_(*want)
    with guarded(order=1):
        elementwise.rope_store_kv_(*args)
    for found, expected in zip(args, want, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rope_store_kv_into_e4m3_pages(dtype: torch.dtype) -> None:
    args = [t.contiguous() for t in make_rope_call(dtype, kv_dtype=FP8, kv_heads=3, head_dim=16)]
    args[1][0] *= 1000  # beyond what e4m3 holds
    check_rope(args, (torch.tensor([0.5, 2.0, 0.01]), torch.tensor([1.5, 0.25, 1.0])))
    assert args[7].float().isfinite().all()


def test_a_rows_bits_are_its_own() -> None:
    x, weight = torch.randn(6, 300).bfloat16(), torch.randn(300).bfloat16()
    with guarded():
        norm, silu = elementwise.rms_norm(x, weight, 1e-5), elementwise.silu_mul(x)
        for rows in ([3], [5, 0, 3]):
            assert torch.equal(elementwise.rms_norm(x[rows], weight, 1e-5), norm[rows])
            assert torch.equal(elementwise.silu_mul(x[rows]), silu[rows])


def test_columns_must_be_contiguous() -> None:
    with pytest.raises(ValueError, match="contiguous"):
        elementwise.silu_mul(torch.zeros(4, 6).t())
