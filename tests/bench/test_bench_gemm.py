"""Linears beside torch's, over weights that no cache holds."""

from __future__ import annotations

import pytest

import multilora_kernels as mk


@pytest.mark.skipif(not mk.HAS_CPP, reason="the C++ library is not built")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "int4"])
def test_linears_are_timed_beside_torchs(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import bench_gemm
    from work import SHAPES

    monkeypatch.setattr(bench_gemm, "COLD", 1 << 16)
    for in_, out in SHAPES["tiny"].fused.values():
        copies = bench_gemm.Copies(in_, out, precision)
        assert len(copies.packed) * copies.bytes >= 1 << 16
        ours, torchs = copies.timed(3, 2)
        assert ours > 0
        assert torchs > 0
