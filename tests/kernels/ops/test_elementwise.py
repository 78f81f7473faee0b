"""Norms, SiLU and rotary positions on a CPU against `reference`; a row's bits are its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

import multilora_kernels as mk
from multilora_kernels import reference
from multilora_kernels.testing.precision import assert_close, to_float64
from tests.harness.kernel_calls.dtypes import by_dtype
from tests.harness.kernel_calls.rope import STORED, make_rope_call

if TYPE_CHECKING:
    from collections.abc import Callable


@by_dtype
def test_rope_store_kv(dtype: torch.dtype) -> None:
    args = make_rope_call(dtype)
    wide, before = to_float64(*args), [t.clone() for t in args]
    mk.rope_store_kv_(*args)
    reference.rope_store_kv_(*wide)
    untouched = torch.ones(24, dtype=torch.bool)
    untouched[STORED] = False
    for i in (0, 7, 8):
        assert_close(args[i], wide[i])
    for i in (7, 8):  # -1 stores nothing anywhere
        pages, old = args[i].flatten(0, 1), before[i].flatten(0, 1)
        assert torch.equal(pages[untouched], old[untouched])


@by_dtype
def test_rope_store_kv_of_tensors_that_lie_apart(dtype: torch.dtype) -> None:
    """The C++ form takes both; a part of a fused projection has other strides."""
    args = make_rope_call(dtype)
    apart = [t.contiguous() for t in args[:3]] + [t.clone() for t in args[3:]]
    mk.rope_store_kv_(*args)
    mk.rope_store_kv_(*apart)
    for i in (0, 7, 8):
        assert torch.equal(args[i], apart[i])


def test_rope_store_kv_into_e4m3_pages() -> None:
    args = make_rope_call(torch.bfloat16)
    args[1][0] *= 1000  # beyond what e4m3 holds
    k_scale, v_scale = torch.tensor([0.5, 2.0]), torch.tensor([1.5, 0.25])
    plain = [t.clone() for t in args]
    mk.rope_store_kv_(*plain)
    args[7:] = [blocks.to(torch.float8_e4m3fn) for blocks in args[7:]]
    mk.rope_store_kv_(*args, k_scale, v_scale)
    assert torch.equal(args[0], plain[0])
    for found, wide, scale in zip(args[7:], plain[7:], (k_scale, v_scale), strict=True):
        stored = [blocks.flatten(0, 1)[STORED].float() for blocks in (found, wide)]
        want = (stored[1] / scale[:, None]).clamp(-448, 448)
        torch.testing.assert_close(stored[0], want, rtol=1 / 16, atol=1e-2)


@pytest.mark.parametrize("rows", [0, 1, 17])
@pytest.mark.parametrize("with_residual", [False, True])
@by_dtype
def test_rms_norm(dtype: torch.dtype, with_residual: bool, rows: int) -> None:
    x, weight = torch.randn(rows, 33).to(dtype), torch.randn(33).to(dtype)
    residual = torch.randn(rows, 33).to(dtype) if with_residual else None
    x_before, wide = x.clone(), to_float64(x, weight, 1e-5, residual)
    assert_close(mk.rms_norm(x, weight, 1e-5, residual), reference.rms_norm(*wide))
    assert torch.equal(x, x_before)
    if residual is not None:
        assert_close(residual, wide[3])


@pytest.mark.parametrize("with_residual", [False, True])
@by_dtype
def test_a_token_may_have_a_norm_of_its_own(dtype: torch.dtype, with_residual: bool) -> None:
    x, weight = torch.randn(17, 33).to(dtype), torch.randn(33).to(dtype)
    residual = torch.randn(17, 33).to(dtype) if with_residual else None
    change, row = torch.randn(3, 33), torch.tensor([-1, 0, 2, 1, -1] * 3 + [2, 0]).int()
    args = x, weight, 1e-5, residual, change, row
    before = None if residual is None else residual.clone()
    wide = to_float64(*args)
    plain = mk.rms_norm(x, weight, 1e-5, None if residual is None else residual.clone())
    found = mk.rms_norm(*args)
    assert_close(found, reference.rms_norm(*wide))
    assert torch.equal(found[row < 0], plain[row < 0])
    assert not torch.equal(found, plain)
    for i in range(17):  # a row's bits are its own
        one = slice(i, i + 1)
        own = None if before is None else before[one].clone()
        assert torch.equal(mk.rms_norm(x[one], weight, 1e-5, own, change, row[one]), found[one])


def test_norms_of_shapes_that_disagree_raise() -> None:
    x, weight, change = torch.zeros(2, 6), torch.zeros(6), torch.zeros(1, 6)
    row = torch.zeros(2, dtype=torch.int32)
    for own, match in (
        ((change, None), "come together"),
        ((change[:, :5], row), "rows, hidden"),
        ((change, row[:1]), "as many rows"),
    ):
        with pytest.raises(ValueError, match=match):
            mk.rms_norm(x, weight, 1e-5, None, *own)


@pytest.mark.parametrize("rows", [0, 1, 17])
@by_dtype
def test_silu_mul(dtype: torch.dtype, rows: int) -> None:
    x = torch.randn(rows, 2 * 47).to(dtype)
    before = x.clone()
    assert_close(mk.silu_mul(x), reference.silu_mul(x.double()))
    assert torch.equal(x, before)


ROW_OPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu_mul": lambda x, _: mk.silu_mul(x),
    "rms_norm": lambda x, weight: mk.rms_norm(x, weight, 1e-5),
}


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("name", ROW_OPS)
@pytest.mark.parametrize("width", [34, 320])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_rows_bits_are_its_own(name: str, dtype: torch.dtype, width: int) -> None:
    call = ROW_OPS[name]
    x, weight = torch.randn(128, width).to(dtype), torch.randn(width).to(dtype)
    whole = call(x, weight)
    for rows in [*torch.arange(128).split(16), torch.arange(128).flip(0)]:
        assert torch.equal(call(x[rows], weight), whole[rows])


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda f: mk.rope_store_kv_(f(2, 3, 4), f(1), f(1), f(9, 4), *[f(1)] * 5), "head_dim"),
        (lambda f: mk.rope_store_kv_(f(2, 3, 4), f(1), f(1), f(9, 2), *[f(1)] * 6), "together"),
        (lambda f: mk.rope_store_kv_(f(2, 3, 4), f(1), f(1), f(9, 2), *[f(1)] * 5), "tokens"),
        (lambda f: mk.rms_norm(f(2, 3), f(4), 1e-5), "weight"),
        (lambda f: mk.rms_norm(f(2, 3), f(3), 1e-5, f(1, 3)), "residual"),
        (lambda f: mk.silu_mul(f(2, 3)), "even"),
    ],
)
def test_shapes_that_disagree_raise(
    call: Callable[[Callable[..., Tensor]], object], match: str
) -> None:
    with pytest.raises(ValueError, match=match):
        call(zeros)


def test_a_weight_of_any_stride() -> None:
    """C++ takes dense ones alone."""
    x, wide = torch.randn(5, 33), torch.randn(66)
    assert_close(mk.rms_norm(x, wide[::2], 1e-5), mk.rms_norm(x, wide[::2].clone(), 1e-5))
