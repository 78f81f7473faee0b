"""The functions that torch calls for CUDA tensors, on CPU tensors: they pass on what ops have."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from multilora_kernels import Table
from multilora_kernels.cuda import dispatch, launch_plans, lora
from multilora_kernels.library import KERNELS
from tests.harness.kernel_calls.lora import make_columns_call, make_lora_call


@pytest.fixture(autouse=True)
def _device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "target_of", lambda where: launch_plans.target(90, 132))


def compare(name: str, *args: Any) -> None:
    """The op's CUDA function against its CPU's: results and tensors changed in place."""
    ours = [a.clone() if isinstance(a, Tensor) else a for a in args]
    op = getattr(torch.ops.multilora, name).default
    found, want = KERNELS["CUDA"][name](*ours), op(*args)
    pairs = [*zip(ours, args, strict=True), (found, want)]
    for changed, expected in pairs:
        if isinstance(expected, Tensor):
            torch.testing.assert_close(changed, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch_invariant", [(), (True,)])
def test_paged_attention(batch_invariant: tuple[bool, ...]) -> None:
    blocks = torch.randn(2, 4, 16, 2, 16)
    table = torch.tensor([[2, 1], [3, 0]], dtype=torch.int32)
    lens, starts = torch.tensor([20, 5]).int(), torch.tensor([0, 9, 10]).int()
    args = (torch.randn(11, 4, 16), *blocks, table, lens, starts, 0.25, 9, 20, None, None)
    compare("paged_attention", *args, *batch_invariant)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("batch_invariant", [(), (True,)])
def test_linear(batch_invariant: tuple[bool, ...], with_bias: bool) -> None:
    args = (torch.randn(3, 32), torch.randn(5, 32), torch.randn(5) if with_bias else None)
    compare("linear", *args, *batch_invariant)


def test_lora_splits_are_those_of_the_plan() -> None:
    device, a_pages = launch_plans.target(90, 132), torch.zeros(1, 1, 8, 4096)
    want = lora.splits(torch.zeros(1, 4096), a_pages, device)
    assert dispatch.lora_splits(torch.zeros(1, 4096), a_pages) == want > 1


@pytest.mark.parametrize("dora", [False, True], ids=["plain", "dora"])
def test_lora(dora: bool) -> None:
    y, x, a, b, table, tiles, starts = make_lora_call([0, 1, -1, 1], torch.float32, dora=dora)
    a, b = a.nan_to_num(), b.nan_to_num()
    table = Table(*(None if t is None else t.nan_to_num() for t in table))
    rest = (*table, *tiles)
    compare("lora_", y, x, a, b, *rest, list(starts))
    planes = torch.randn(2, len(y), 3 * table.page_ids.shape[1] * 8)
    compare("lora_expand_", y, planes, b, *rest, list(starts))
    ids, a_embed = torch.tensor([3, 1, 0, 2]), torch.randn(len(b), 4, 8)
    compare("lora_embed_", y, ids, a_embed, b, *rest)


def test_lora_columns() -> None:
    y, x, changes, tiles = make_columns_call([0, 2, -1, 2])
    compare("lora_columns_", y, x, *changes, *tiles)


def test_the_others() -> None:
    x, index = torch.randn(3, 8), torch.arange(3)
    compare("rms_norm", x, torch.randn(8), 1e-5)
    own = torch.randn(2, 8), torch.tensor([1, -1, 0], dtype=torch.int32)
    compare("add_rms_norm_", torch.randn(3, 8), x, torch.randn(8), 1e-5, *own)
    compare("silu_mul", x)
    mask = torch.tensor([[5], [0], [-1]], dtype=torch.int32)
    compare("apply_token_mask_", x, mask)
    q, k, v = (torch.randn(3, heads, 16) for heads in (4, 2, 2))
    blocks, angles = torch.randn(2, 4, 8, 2, 16), torch.randn(9, 8)
    args = (q, k, v, angles.cos(), angles.sin(), index, index, *blocks)
    compare("rope_store_kv_", *args)
