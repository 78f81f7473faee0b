"""Panels hold every weight once, at the place that the C++ GEMM reads, and zeros beside them."""

from __future__ import annotations

import pytest
import torch

from multilora_kernels.cpu import native, panels

SIZES = [(1, 1), (32, 8), (33, 17), (70, 24)]  # outputs, inputs
by_size = pytest.mark.parametrize(("out", "in_"), SIZES)


def numbers(kind: str, out: int, in_: int) -> torch.Tensor:
    if kind.startswith("int"):
        low, high = (-8, 8) if kind == "int4" else (-128, 128)
        return torch.randint(low, high, (out, in_), dtype=torch.int8)
    return torch.randn(out, in_).to(getattr(torch, kind))


@by_size
@pytest.mark.parametrize("kind", panels.KINDS)
def test_rows_come_back_as_they_were(kind: str, out: int, in_: int) -> None:
    weight = numbers(kind, out, in_)
    made = panels.make(weight, kind)
    rows = torch.randperm(out)
    assert torch.equal(panels.rows_of(made, kind, in_, rows), weight[rows])


@by_size
@pytest.mark.parametrize("kind", [kind for kind in panels.KINDS if kind != "int4"])
def test_a_word_holds_inputs_of_one_output_and_the_rest_is_zero(
    kind: str, out: int, in_: int
) -> None:
    weight, size = numbers(kind, out, in_), panels.IN_WORD[kind]
    made = panels.make(weight, kind)
    inputs = -(-in_ // 8) * 8
    assert made.shape == (-(-out // 32), inputs // size, 32, size)
    whole = made.permute(0, 2, 1, 3).reshape(-1, inputs)  # outputs first
    assert torch.equal(whole[:out, :in_], weight)
    assert not whole[out:].any()
    assert not whole[:, in_:].any()


def test_eight_int4_codes_are_a_word() -> None:
    codes = torch.tensor([[1, 2, 3, 4, 5, 6, 7, -8]], dtype=torch.int8)
    word = panels.make(codes, "int4")[0, 0, 0].tolist()
    low, high = [1, 3, 5, 7], [2, 4, 6, 8]  # inputs 0 2 4 6 and 1 3 5 7, -8 as 8
    nibbles = [part for byte in word for part in (byte & 15, byte >> 4)]
    assert nibbles == [*low, *high]


def test_large_weights_are_put_in_panels_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(150, 16)
    whole = panels.make(weight, "float32")
    monkeypatch.setattr(panels, "CHUNK", 1)  # a panel at a time
    assert torch.equal(panels.make(weight, "float32"), whole)


def test_scales_lie_by_group_then_output() -> None:
    scales = torch.rand(33, 2)
    made = panels.make_scales(scales)
    assert made.shape == (2, 64)
    assert torch.equal(made[:, :33], scales.T)
    assert not made[:, 33:].any()


@pytest.mark.skipif(native.LIB is None, reason="the C++ library is not built")
def test_groups_that_the_gemm_reads() -> None:
    assert panels.usable(4096, 4096)
    assert panels.usable(100, 128)
    assert [group for group in (16, 32, 64, 96, 128) if panels.usable(4096, group)] == [32, 64, 128]
