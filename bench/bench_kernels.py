"""Each op of multilora_kernels on a CPU, by its C++ kernel and by its torch form: `make bench`.

    pytest bench/bench_kernels.py --benchmark-only --work 1b --precision bf16 --ranks 16 -k lora

A decode step of 16 requests with 512 tokens behind them and a prompt step of 512 tokens, by default
of the 132M shape of work.py in fp32. LoRA has 16 adapters of ranks 8, 16, 32 and 64, or those of
`--ranks`, an equal share of the tokens each. Every call is first compared with its definition in
`reference`. Linears have a bench of their own, bench_gemm.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only
from work import NUM_ADAPTERS, SHAPES, Shape

import multilora_kernels as mk
from multilora_kernels import reference
from multilora_kernels.cpu import native
from multilora_kernels.testing.precision import assert_close

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CONTEXT, BLOCK = 512, 16
STEPS = {"decode": NUM_ADAPTERS, "prompt": 512}  # tokens
Run = Callable[..., None]


needs_cpp = pytest.mark.skipif(native.LIB is None, reason="the C++ library is not built")


@pytest.fixture(params=[pytest.param("C++", marks=needs_cpp), "torch"])
def run(request: pytest.FixtureRequest, benchmark: Any) -> Iterator[Run]:
    """Times a call beside the other form of it, after a comparison with its definition."""
    form = request.param
    others = [part for part in request.node.callspec.id.split("-") if part != form]
    benchmark.group = " ".join([request.node.originalname.removeprefix("test_"), *others])

    def checked(op: Callable[..., Any], definition: Callable[..., Any], *args: Any) -> None:
        assert_same(op, definition, args)
        benchmark(op, *args)

    with patch.object(native, "LIB", native.LIB if form == "C++" else None):
        yield checked


def assert_same(op: Callable[..., Any], definition: Callable[..., Any], args: Any) -> None:
    """Their results, and what they change in place."""
    ours, theirs = (tree_map_only(Tensor, torch.clone, args) for _ in range(2))
    found, expected = (op(*ours), ours), (definition(*theirs), theirs)
    for mine, other in zip(tree_leaves(found), tree_leaves(expected), strict=True):
        if not isinstance(mine, Tensor):
            continue
        if mine.is_floating_point():
            assert_close(mine.float() if mine.dtype == torch.float64 else mine, other)
        else:
            assert torch.equal(mine, other)


@pytest.fixture
def shape(pytestconfig: pytest.Config) -> Shape:
    return SHAPES[pytestconfig.getoption("work")]


@pytest.fixture
def dtype(pytestconfig: pytest.Config) -> torch.dtype:
    return DTYPES[pytestconfig.getoption("precision")]


@pytest.fixture(params=STEPS)
def tokens(request: pytest.FixtureRequest) -> int:
    """Of one step."""
    return STEPS[request.param]


def test_lora(
    run: Run, tokens: int, shape: Shape, dtype: torch.dtype, pytestconfig: pytest.Config
) -> None:
    ranks = [int(rank) for rank in pytestconfig.getoption("ranks").split(",")]
    hidden, inter = shape.hidden, shape.inter

    def weights(rank: int) -> mk.LoraWeights:
        a, b = torch.randn(rank, hidden), torch.randn(inter, rank)
        return mk.LoraWeights(a, b, (hidden * rank) ** -0.5)

    ranks = [ranks[i % len(ranks)] for i in range(NUM_ADAPTERS)]
    starts = (0, inter, 2 * inter)  # gate and up
    packed = mk.pack_lora([[weights(r), weights(r)] for r in ranks], starts, dtype=dtype)
    slots = [t * NUM_ADAPTERS // tokens for t in range(tokens)]
    tiles = mk.make_tiles(slots, mk.DECODE_TILE if tokens == NUM_ADAPTERS else mk.PREFILL_TILE)
    x, y = torch.randn(tokens, hidden).to(dtype), torch.randn(tokens, 2 * inter).to(dtype)
    run(mk.lora_, reference.lora_, y, x, *packed, tiles, starts)


class Cache:
    """KV blocks of 16 sequences, and what a step of `tokens` asks of them."""

    def __init__(self, shape: Shape, tokens: int, dtype: torch.dtype) -> None:
        seqs = tokens if tokens == NUM_ADAPTERS else 1
        blocks = seqs * CONTEXT // BLOCK
        size = (blocks, BLOCK, shape.kv_heads, shape.head_dim)
        self.k = mk.empty_huge(size, dtype).normal_()
        self.v = mk.empty_huge(size, dtype).normal_()
        self.table = torch.randperm(blocks, dtype=torch.int32).view(seqs, -1)
        self.lens = torch.full((seqs,), CONTEXT, dtype=torch.int32)
        self.queries = tokens // seqs
        self.starts = torch.arange(0, tokens + 1, self.queries, dtype=torch.int32)


def test_paged_attention(run: Run, tokens: int, shape: Shape, dtype: torch.dtype) -> None:
    cache, scale = Cache(shape, tokens, dtype), shape.head_dim**-0.5
    q = torch.randn(tokens, shape.heads, shape.head_dim).to(dtype)
    longest = {"max_query_len": cache.queries, "max_seq_len": CONTEXT}
    run(
        partial(mk.paged_attention, scale=scale, **longest),
        partial(reference.paged_attention, scale=scale),
        *(q, cache.k, cache.v, cache.table, cache.lens, cache.starts),
    )


def test_rope_store_kv(run: Run, tokens: int, shape: Shape, dtype: torch.dtype) -> None:
    cache = Cache(shape, tokens, dtype)
    q = torch.randn(tokens, shape.heads, shape.head_dim).to(dtype)
    k, v = torch.randn(2, tokens, shape.kv_heads, shape.head_dim).to(dtype)
    angles, at = torch.rand(CONTEXT, shape.head_dim // 2), torch.arange(tokens)
    tables = (angles.cos(), angles.sin())
    run(mk.rope_store_kv_, reference.rope_store_kv_, q, k, v, *tables, at, at, cache.k, cache.v)


def test_rms_norm(run: Run, tokens: int, shape: Shape, dtype: torch.dtype) -> None:
    x, residual = torch.randn(2, tokens, shape.hidden).to(dtype)
    weight = torch.ones(shape.hidden, dtype=dtype)
    run(mk.rms_norm, reference.rms_norm, x, weight, 1e-5, residual)


def test_silu_mul(run: Run, tokens: int, shape: Shape, dtype: torch.dtype) -> None:
    run(mk.silu_mul, reference.silu_mul, torch.randn(tokens, 2 * shape.inter).to(dtype))


@pytest.mark.parametrize("top", [0, 5])
def test_top_logprobs(run: Run, top: int, shape: Shape, dtype: torch.dtype) -> None:
    logits, targets = torch.randn(NUM_ADAPTERS, shape.vocab).to(dtype), torch.arange(NUM_ADAPTERS)
    run(mk.top_logprobs, reference.top_logprobs, logits, targets, top)


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_draw(run: Run, top_p: float, shape: Shape, dtype: torch.dtype) -> None:
    rows = NUM_ADAPTERS
    settings = (
        torch.full((rows,), 0.8),
        torch.full((rows,), shape.vocab),
        torch.full((rows,), top_p, dtype=torch.float64),
        torch.full((rows,), -torch.inf, dtype=torch.float64),
        torch.randint(2**53, (rows,)),
    )
    run(mk.draw, reference.draw, 3 * torch.randn(rows, shape.vocab).to(dtype), *settings)
