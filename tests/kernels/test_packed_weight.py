"""Packed and quantised weights. Oracle: float64, on codes and scales that are looked at as such."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

import multilora_kernels as mk
from multilora_kernels import reference
from multilora_kernels.cpu import panels

if TYPE_CHECKING:
    pass

TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2.5e-2}
KINDS = ["float32", "bfloat16", "float16", "int8", "int8/32", "int4/32", "int4/128", "int4"]
SHAPES = [(47, 128), (3, 33), (130, 1)]  # out, in: whole groups and tails

kinds = pytest.mark.parametrize("kind", KINDS)
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: str(d)[6:])


def packed_of(weight: Tensor, kind: str) -> mk.PackedWeight:
    """The weight packed as a kind of `KINDS`: a dtype, or bits and perhaps a group."""
    name, _, group = kind.partition("/")
    if not name.startswith("int"):
        return mk.pack(weight.to(getattr(torch, name)))
    size, bits = int(group) if group else None, int(name[3:])
    return mk.pack_quantized(*mk.quantize(weight, bits, size), bits, size or weight.shape[1])


def random_weight(shape: tuple[int, int]) -> Tensor:
    return torch.randn(shape) / shape[1] ** 0.5


# Quantising ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [None, 1, 32, 128])
@pytest.mark.parametrize("bits", [8, 4])
@shapes
def test_codes_are_the_nearest(shape: tuple[int, int], bits: int, group: int | None) -> None:
    weight = random_weight(shape)
    codes, scales = mk.quantize(weight, bits, group)
    size = shape[1] if group is None else group
    assert codes.dtype == torch.int8
    assert codes.shape == shape
    assert scales.dtype == torch.float32
    assert scales.shape == (shape[0], -(-shape[1] // size))
    low, high = (-127, 127) if bits == 8 else (-8, 7)
    assert int(codes.min()) >= low
    assert int(codes.max()) <= high
    # By hand, one weight after another, with all codes there are.
    every = torch.arange(low, high + 1).double()
    for i, j in [(0, 0), (shape[0] - 1, shape[1] - 1), (shape[0] // 2, shape[1] // 2)]:
        scale = scales[i, j // size].double()
        best = (every * scale - weight[i, j].double()).abs().min()
        own = (int(codes[i, j]) * scale - weight[i, j].double()).abs()
        assert own <= best + 1e-6 * scale.abs()


@pytest.mark.parametrize("bits", [8, 4])
def test_a_group_has_its_own_scale(bits: int) -> None:
    weight = torch.cat([torch.randn(5, 32) * 10.0**i for i in (-20, 0, 20)], 1)
    found = mk.unpack(mk.pack_quantized(*mk.quantize(weight, bits, 32), bits))
    step = weight.view(5, 3, 32).abs().amax(-1) / (127 if bits == 8 else 7)
    error = (found - weight).view(5, 3, 32).abs().amax(-1)
    assert (error <= step * (0.501 if bits == 8 else 1.01)).all()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("value", [0.0, 1e-45, -1e-40])
def test_a_group_of_nothing_stays_finite(bits: int, value: float) -> None:
    weight = torch.full((3, 64), value)
    weight[1, :32] = 1.0
    found = mk.unpack(mk.pack_quantized(*mk.quantize(weight, bits, 32), bits))
    assert torch.allclose(found, weight, atol=1e-30)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_is_refused(bits: int, value: float) -> None:
    weight = torch.randn(3, 64)
    weight[2, 63] = value
    with pytest.raises(ValueError, match="infinite or NaN"):
        mk.quantize(weight, bits, 32)


@pytest.mark.parametrize("bits", [8, 4])
def test_quantising_in_parts_changes_nothing(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random_weight((37, 64))
    whole = mk.quantize(weight, bits, 32)
    monkeypatch.setattr("multilora_kernels.packed_weight._CHUNK", 64 * 5)
    parts = mk.quantize(weight, bits, 32)
    assert torch.equal(whole[0], parts[0])
    assert torch.equal(whole[1], parts[1])


# Packing ------------------------------------------------------------------------------------------


@kinds
@shapes
def test_unpack_gives_back_what_was_packed(shape: tuple[int, int], kind: str) -> None:
    weight = random_weight(shape)
    packed = packed_of(weight, kind)
    assert (packed.kind, packed.out, packed.in_) == (kind.partition("/")[0], *shape)
    found = mk.unpack(packed)
    assert found.dtype == torch.float32
    if packed.scales is None:
        assert torch.equal(found, weight.to(getattr(torch, kind)).float())
        return
    codes, scales = mk.quantize(weight, int(packed.kind[3:]), packed.group)
    wide = reference.dequantize(codes, scales.double(), packed.group)
    torch.testing.assert_close(found.double(), wide, rtol=1e-6, atol=0)


@kinds
@shapes
def test_unpack_rows_are_rows_of_unpack(shape: tuple[int, int], kind: str) -> None:
    packed = packed_of(random_weight(shape), kind)
    rows = torch.tensor([shape[0] - 1, 0, 2, 2])
    assert torch.equal(mk.unpack_rows(packed, rows), mk.unpack(packed)[rows])
    assert mk.unpack_rows(packed, rows[:0]).shape == (0, shape[1])


@pytest.mark.parametrize(
    ("kind", "most"),
    [("float32", 4.0), ("bfloat16", 2.0), ("int8", 1.02), ("int8/32", 1.125), ("int4/32", 0.625)],
)
def test_memory_is_what_the_bits_say(kind: str, most: float) -> None:
    packed = packed_of(random_weight((256, 512)), kind)
    assert packed.num_bytes <= most * 256 * 512 * 1.001


def test_every_code_survives() -> None:
    codes = torch.arange(-8, 8, dtype=torch.int8).repeat(3, 2)
    scales = torch.tensor([[1.0], [-0.5], [0.0]])
    for bits in (4, 8):
        assert torch.equal(mk.unpack(mk.pack_quantized(codes, scales, bits)), codes * scales)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: mk.pack(torch.zeros(2, 3, dtype=torch.int8)), "int8"),
        (lambda: mk.pack(torch.zeros(3)), "matrix"),
        (lambda: mk.quantize(torch.zeros(2, 3), 3, None), "bits"),
        (lambda: mk.quantize(torch.zeros(2, 3), 8, 0), "group"),
        (lambda: mk.pack_quantized(torch.zeros(2, 8).to(torch.int8), torch.ones(2, 3), 8), "fit"),
        (lambda: mk.pack_quantized(torch.zeros(2, 8).to(torch.int8), torch.ones(2, 1), 2), "bits"),
        (lambda: mk.linear(torch.zeros(1, 4), mk.pack(torch.zeros(2, 3))), "4 columns"),
    ],
)
def test_mistakes_raise(call: object, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        call()  # type: ignore[operator]


# The linear ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [0, 1, 16, 33])
@pytest.mark.parametrize("with_bias", [False, True])
@kinds
@shapes
@dtypes
def test_linear_is_the_dequantised_one(
    dtype: torch.dtype, shape: tuple[int, int], kind: str, with_bias: bool, rows: int
) -> None:
    packed = packed_of(random_weight(shape), kind)
    x = torch.randn(rows, shape[1]).to(dtype)
    bias = torch.randn(shape[0]).to(dtype) if with_bias else None
    found = mk.linear(x, packed, bias)
    wide = None if bias is None else bias.double()
    expected = reference.linear(x.double(), mk.unpack(packed).double(), wide)
    assert found.dtype == dtype
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


@kinds
def test_linear_in_parts_changes_no_more_than_rounding(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed, x = packed_of(random_weight((70, 64)), kind), torch.randn(16, 64)
    whole = mk.linear(x, packed)
    monkeypatch.setattr("multilora_kernels.cpu.linear.CHUNK", 64 * 16)
    torch.testing.assert_close(mk.linear(x, packed), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("shape", [(47, 34), (64, 320)], ids=str)
@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_bits_of_sixteen_rows_are_their_own(
    dtype: torch.dtype, kind: str, shape: tuple[int, int]
) -> None:
    packed, x = packed_of(random_weight(shape), kind), torch.randn(128, shape[1]).to(dtype)
    whole = mk.linear(x, packed)
    for rows in [*torch.arange(128).split(16), torch.arange(128).flip(0)]:
        assert torch.equal(mk.linear(x[rows], packed), whole[rows])


@pytest.mark.usefixtures("threads", "isa")
@kinds
@dtypes
def test_every_instruction_set_gives_any_number_of_rows_their_own_bits(
    dtype: torch.dtype, kind: str
) -> None:
    """Up to more rows than one chunk of the GEMM has, and more inputs than one of its blocks."""
    weight = random_weight((47, 1090))
    packed, x = packed_of(weight, kind), torch.randn(450, 1090).to(dtype)
    whole, tolerance = mk.linear(x, packed), TOLERANCE[dtype]
    expected = reference.linear(x.double(), mk.unpack(packed).double())
    torch.testing.assert_close(whole.double(), expected, rtol=tolerance, atol=tolerance)
    for first, count in [(449, 1), (3, 2), (7, 5), (0, 13), (100, 49), (33, 385)]:
        part = slice(first, first + count)
        assert torch.equal(mk.linear(x[part], packed), whole[part])


@kinds
def test_panels_made_in_parts_are_the_same(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not mk.HAS_CPP:
        pytest.skip("the C++ library is not built")
    weight = random_weight((130, 66))
    whole = packed_of(weight, kind)
    assert whole.in_panels
    monkeypatch.setattr(panels, "CHUNK", 66 * 40)
    assert torch.equal(packed_of(weight, kind).data, whole.data)


@pytest.mark.seconds
@kinds
def test_opcheck(kind: str) -> None:
    args = (torch.randn(4, 64), *packed_of(random_weight((5, 64)), kind), torch.randn(5))
    torch.library.opcheck(torch.ops.multilora.linear_packed.default, args)
