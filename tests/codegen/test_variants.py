"""How many variants of each kernel there are: what differs from step to step must make none."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from multilora_kernels import Columns, Compilations, Table, make_tiles
from multilora_kernels.cuda import (
    attention,
    elementwise,
    launch_plans,
    linear,
    lora,
    lora_columns,
)
from multilora_kernels.testing.variants import Key, recording

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
COUNTS = (1, 2, 3, 15, 16, 17, 64, 128)
WIDE_COUNTS = (129, 144, 200, 255, 256)


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int32)


def attend(
    seqs: int,
    max_query_len: int,
    columns: int = 4,  # of the block table
    kv_dtype: torch.dtype = BF16,
    layer: int = 0,
    **options: Any,
) -> None:
    """A step over two KV heads, on which a layer's scales begin at 8 bytes a layer."""
    fused_qkv = torch.zeros(max(seqs, max_query_len), 12, 16, dtype=BF16)
    k_blocks, v_blocks = torch.zeros(2, 4, 16, 2, 16).to(kv_dtype)
    scales = [torch.ones(3, 2)[layer]] * 2 if kv_dtype == FP8 else [None, None]
    table, lens, starts = zeros(seqs, columns), zeros(seqs), zeros(seqs + 1)
    attention.paged_attention(
        fused_qkv[:, :8], k_blocks, v_blocks, table, lens, starts, 0.1, max_query_len, 16 * columns,
        *scales, sm=90, **options,
    )  # fmt: skip


def names(keys: list[Key]) -> dict[str, int]:
    return dict(Counter(key.kernel for key in keys))


@pytest.mark.parametrize("options", [{}, {"batch_invariant": True}, {"kv_dtype": FP8}], ids=str)
def test_attention_compiles_once_for_many_sequences(options: dict[str, Any]) -> None:
    once = {"_split_kernel": 1, "_chunk_kernel": 1, "merge_kernel": 1}
    with recording() as keys:
        attend(5, 40, **options)
        assert names(keys) == once
        for i, seqs in enumerate(COUNTS):
            for max_query_len in (1, 2, 4, 5, 64):
                attend(seqs, max_query_len, 1 + 5 * i, layer=i % 3, **options)
        assert names(keys) == once
        for seqs in WIDE_COUNTS:
            for max_query_len in (1, 7):
                attend(seqs, max_query_len, **options)
        assert names(keys) == dict.fromkeys(once, 2)


@pytest.mark.parametrize("count", [1, 128, 129, 256, 257, 1024, 1025, 2048, 2049, 5000])
def test_the_sequence_blocks_are_those_that_are_announced(count: int) -> None:
    bounds = launch_plans.seq_bounds(count)
    assert launch_plans.seq_block(count) == next(bound for bound in bounds if bound >= count)
    assert all(launch_plans.seq_block(bound) == bound for bound in bounds)


def lora_step(tokens: int, slices: int, max_pages: int) -> None:
    """LoRA at a site of that many slices, on pages of one of two layers."""
    a_pages = torch.zeros(3, 2, slices, 8, 64, dtype=BF16)[:, 1]
    b_pages = torch.zeros(3, 2, 8, 64 * slices, dtype=BF16)[:, 1]
    table = Table(zeros(4, max_pages), torch.zeros(4, max_pages), zeros(4))
    y, x = (torch.zeros(tokens, n, dtype=BF16) for n in (64 * slices, 64))
    starts = tuple(range(0, 64 * slices + 1, 64))
    tiles = make_tiles([0] * tokens, 16)
    lora.lora_(y, x, a_pages, b_pages, table, tiles, starts, launch_plans.target(90, 132))


def test_lora_compiles_for_row_kinds_and_sites_alone() -> None:
    kinds = sorted({1, *(bound + 1 for bound in launch_plans.load(90).row_bounds())})
    with recording() as keys:
        for tokens in kinds:
            for slices in (1, 2, 3):
                lora_step(tokens, slices, 8)
        before = names(keys)
        for i, tokens in enumerate((1, 2, 7, 16, 24, 64, 80, 200, 256, 272, 500, 512)):
            for slices in (1, 2, 3):
                lora_step(tokens, slices, 1 + 5 * i)
        assert names(keys) == before
    assert before["_shrink_kernel"] == 2  # a decode step's and a prompt's, for all sites
    assert before["_expand_kernel"] == 2 * 3


def test_an_embedding_compiles_for_row_kinds_alone() -> None:
    with recording() as keys:
        for tokens in (1, 2, 16, 256, 257, 300):
            y, ids = torch.zeros(tokens, 64, dtype=BF16), torch.zeros(tokens, dtype=torch.int64)
            a_pages = torch.zeros(3, 100, 8, dtype=BF16)
            b_pages = torch.zeros(3, 8, 64, dtype=BF16)
            table = Table(zeros(4, tokens), torch.zeros(4, tokens), zeros(4))
            tiles = make_tiles([0] * tokens, 16)
            lora.lora_embed_(y, ids, a_pages, b_pages, table, tiles, launch_plans.target(90, 132))
    assert names(keys) == {"_expand_kernel": 2}


def test_trained_columns_compile_once() -> None:
    with recording() as keys:
        for tokens in (1, 2, 16, 100):
            y, x = torch.zeros(tokens, 100, dtype=BF16), torch.zeros(tokens, 64, dtype=BF16)
            changes = Columns(zeros(3, 8), zeros(3), torch.zeros(3, 8, 64, dtype=BF16))
            lora_columns.lora_columns_(y, x, changes, make_tiles([0] * tokens, 16))
    assert names(keys) == {"_columns_kernel": 1}


def test_the_product_compiles_for_row_kinds_alone() -> None:
    weight = torch.zeros(64, 128, dtype=BF16)
    with recording() as keys:
        for tokens in (1, 2, 16, 63, 64, 65, 100, 256, 257, 1000):
            linear.matmul(torch.zeros(tokens, 128, dtype=BF16), weight)
    assert names(keys) == {"_matmul_kernel": 1 + len(launch_plans.MATMUL_ROWS)}


def test_elementwise_kernels_compile_once() -> None:
    with recording() as keys:
        for i, tokens in enumerate((1, 2, 16, 100)):
            x = torch.zeros(tokens, 64, dtype=BF16)
            elementwise.rms_norm(x, x[0].clone(), 1e-5, torch.zeros_like(x))
            elementwise.silu_mul(x)
            q, k, v = torch.zeros(tokens, 12, 16, dtype=BF16).split((8, 2, 2), 1)
            k_blocks, v_blocks = torch.zeros(2, 4, 16, 2, 16).to(FP8)
            index, scale = torch.zeros(tokens, dtype=torch.int64), torch.ones(4, 2)[i]
            angles = torch.zeros(64, 8)
            elementwise.rope_store_kv_(
                q, k, v, angles, angles, index, index, k_blocks, v_blocks, scale, scale
            )
    assert set(names(keys).values()) == {1}
    assert len(names(keys)) == 3


# What is said of a compilation --------------------------------------------------------------------


@triton.jit(do_not_specialize=("loose",))
def _add_one(x_ptr, count, loose, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(x_ptr + offs, tl.load(x_ptr + offs, mask=offs < count) + loose, mask=offs < count)


def add_one(count: int, block: int = 16, offset: int = 0) -> None:
    _add_one[(1,)](torch.zeros(64)[offset:], count, 1, BLOCK=block, enable_fp_fusion=False)


def test_a_late_compilation_is_counted_and_its_kernel_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    compilations, other = Compilations(), Compilations()
    with recording() as keys, caplog.at_level(logging.WARNING, "multilora_kernels"):
        with compilations.watch():
            add_one(16)
        assert (len(compilations.expected), compilations.late, caplog.messages) == (1, [], [])
        with compilations.watch(serving=True):
            add_one(32)
            assert compilations.late == []
            add_one(32, block=32)
            add_one(32, block=32)
        with other.watch():
            add_one(5, offset=1)
    assert len(keys) == 3
    (late,) = compilations.late
    assert late.kernel == "_add_one"
    assert late.arguments == "x_ptr: *fp32/16, count: i32/16, loose: i32, BLOCK=32"
    (message,) = caplog.messages
    assert "Triton compiled _add_one while requests waited" in message
    assert late.arguments in message
    (found,) = other.expected
    assert found.arguments == "x_ptr: *fp32, count: i32, loose: i32, BLOCK=16"


def test_what_nobody_watches_is_nobodys(caplog: pytest.LogCaptureFixture) -> None:
    compilations = Compilations()
    with recording() as keys:
        with compilations.watch(serving=True):
            pass
        add_one(16)
    assert len(keys) == 1
    assert not compilations.late
    assert not caplog.messages


def test_a_recording_begins_with_nothing_compiled() -> None:
    with recording() as first:
        add_one(16)
    with recording() as second:
        add_one(16)
    assert first == second != []


def test_interpreter_mode_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"), recording():
        pass
