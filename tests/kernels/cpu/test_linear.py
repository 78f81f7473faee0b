"""What the CPU forms do when torch's GEMM does not keep rows apart."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

import multilora_kernels as ops
from multilora_kernels.cpu import linear

if TYPE_CHECKING:
    from torch import Tensor


@pytest.fixture
def gemm_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Row counts of the calls of a GEMM whose bits differ from 48 rows on."""
    calls: list[int] = []
    gemm = torch.nn.functional.linear

    def mixing(x: Tensor, weight: Tensor) -> Tensor:
        calls.append(len(x))
        y = gemm(x, weight)
        return y + torch.finfo(y.dtype).eps * y.abs().amax() if len(x) >= 48 else y

    monkeypatch.setattr(linear.F, "linear", mixing)
    monkeypatch.setattr(linear, "_APART", {})
    return calls


def test_a_gemm_that_mixes_rows_runs_in_blocks_of_sixteen(
    gemm_rows: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    x, weight = torch.randn(48, 40), torch.randn(24, 40)
    alone = torch.cat([ops.linear(rows, weight) for rows in x.split(16)])
    assert torch.equal(ops.linear(x, weight), alone)
    assert [record.getMessage() for record in caplog.records] == [
        "torch's GEMM (torch.float32, 48, 40, 24, "
        f"{torch.get_num_threads()}) mixes rows on this CPU: it runs 16 at a time"
    ]
    gemm_rows.clear()
    assert torch.equal(ops.linear(x, weight), alone)
    assert gemm_rows == [16, 16, 16]


def test_a_gemm_that_keeps_rows_apart_is_tried_once_and_runs_whole(gemm_rows: list[int]) -> None:
    x, weight = torch.randn(32, 40), torch.randn(24, 40)
    ops.linear(x, weight)
    assert gemm_rows == [32, 16, 16, 32]  # twice on noise, then for good
    gemm_rows.clear()
    ops.linear(x, weight)
    assert gemm_rows == [32]


def test_each_shape_dtype_and_thread_count_is_tried_on_its_own(gemm_rows: list[int]) -> None:
    threads = torch.get_num_threads()
    try:
        for dtype in (torch.float32, torch.bfloat16):
            for count in (1, 2):
                torch.set_num_threads(count)
                ops.linear(torch.randn(32, 40).to(dtype), torch.randn(24, 40).to(dtype))
    finally:
        torch.set_num_threads(threads)
    assert len(gemm_rows) == 4 * len([32, 16, 16, 32])
