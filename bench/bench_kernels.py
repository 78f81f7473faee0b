"""Each op of multilora_kernels on a CPU, by its C++ kernel and by its torch form: `make bench`.

The 132M shape of work.py in fp32: a decode step of 16 requests with 512 tokens behind them, and a
prompt step of 512 tokens. LoRA has 16 adapters of ranks 8, 16, 32 and 64, an equal share of the
tokens each. Linears have a bench of their own, bench_gemm.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from work import NUM_ADAPTERS, SHAPES, rank_of

import multilora_kernels as mk
from multilora_kernels.cpu import native

SHAPE = SHAPES["132m"]
CONTEXT, BLOCK = 512, 16
STEPS = {"decode": NUM_ADAPTERS, "prompt": 512}  # tokens
Run = Callable[[Callable[[], Any]], None]


needs_cpp = pytest.mark.skipif(native.LIB is None, reason="the C++ library is not built")


@pytest.fixture(params=[pytest.param("C++", marks=needs_cpp), "torch"])
def run(request: pytest.FixtureRequest, benchmark: Any) -> Iterator[Run]:
    """Times a call, in a table with the other form of the same call."""
    form = request.param
    others = [part for part in request.node.callspec.id.split("-") if part != form]
    benchmark.group = " ".join([request.node.originalname.removeprefix("test_"), *others])
    with patch.object(native, "LIB", native.LIB if form == "C++" else None):
        yield benchmark


@pytest.fixture(params=STEPS)
def tokens(request: pytest.FixtureRequest) -> int:
    """Of one step."""
    return STEPS[request.param]


def adapters(sites: int, in_: int, out: int) -> tuple[Tensor, Tensor, mk.Table]:
    """Rank pages of 16 adapters, of `sites` fused linears, and their table."""
    counts = [rank_of(i) // 8 for i in range(NUM_ADAPTERS)]
    a = mk.empty_huge((sum(counts), sites, 8, in_), torch.float32).normal_(0, in_**-0.5)
    b = mk.empty_huge((sum(counts), 8, out), torch.float32).normal_()
    ids = torch.zeros(NUM_ADAPTERS, max(counts), dtype=torch.int32)
    for slot, count in enumerate(counts):
        ids[slot, :count] = torch.arange(count) + sum(counts[:slot])
    weights = torch.ones(ids.shape)
    return a, b, mk.Table(ids, weights, torch.tensor(counts, dtype=torch.int32))


def test_lora(run: Run, tokens: int) -> None:
    inter = SHAPE.inter
    a, b, table = adapters(2, SHAPE.hidden, 2 * inter)
    slots = [t * NUM_ADAPTERS // tokens for t in range(tokens)]
    tiles = mk.make_tiles(slots, mk.DECODE_TILE if tokens == NUM_ADAPTERS else mk.PREFILL_TILE)
    x, y = torch.randn(tokens, SHAPE.hidden), torch.randn(tokens, 2 * inter)
    run(lambda: mk.lora_(y, x, a, b, table, tiles, (0, inter, 2 * inter)))


class Pages:
    """KV of 16 sequences, and what a step of `tokens` asks of it."""

    def __init__(self, tokens: int) -> None:
        seqs = tokens if tokens == NUM_ADAPTERS else 1
        blocks = seqs * CONTEXT // BLOCK
        shape = (blocks, BLOCK, SHAPE.kv_heads, SHAPE.head_dim)
        self.k = mk.empty_huge(shape, torch.float32).normal_()
        self.v = mk.empty_huge(shape, torch.float32).normal_()
        self.table = torch.randperm(blocks, dtype=torch.int32).view(seqs, -1)
        self.lens = torch.full((seqs,), CONTEXT, dtype=torch.int32)
        self.queries = tokens // seqs
        self.starts = torch.arange(0, tokens + 1, self.queries, dtype=torch.int32)


def test_paged_attention(run: Run, tokens: int) -> None:
    pages, q = Pages(tokens), torch.randn(tokens, SHAPE.heads, SHAPE.head_dim)
    run(
        lambda: mk.paged_attention(
            q, pages.k, pages.v, pages.table, pages.lens, pages.starts,
            scale=SHAPE.head_dim**-0.5, max_query_len=pages.queries, max_seq_len=CONTEXT,
        )
    )  # fmt: skip


def test_rope_store_kv(run: Run, tokens: int) -> None:
    pages, q = Pages(tokens), torch.randn(tokens, SHAPE.heads, SHAPE.head_dim)
    k, v = torch.randn(2, tokens, SHAPE.kv_heads, SHAPE.head_dim)
    cos, sin = torch.randn(2, CONTEXT, SHAPE.head_dim // 2)
    at = torch.arange(tokens)
    run(lambda: mk.rope_store_kv_(q, k, v, cos, sin, at, at, pages.k, pages.v))


def test_rms_norm(run: Run, tokens: int) -> None:
    x, residual = torch.randn(2, tokens, SHAPE.hidden)
    weight = torch.ones(SHAPE.hidden)
    run(lambda: mk.rms_norm(x, weight, 1e-5, residual))


def test_silu_mul(run: Run, tokens: int) -> None:
    x = torch.randn(tokens, 2 * SHAPE.inter)
    run(lambda: mk.silu_mul(x))


@pytest.mark.parametrize("top", [0, 5])
def test_top_logprobs(run: Run, top: int) -> None:
    logits, targets = torch.randn(NUM_ADAPTERS, SHAPE.vocab), torch.arange(NUM_ADAPTERS)
    run(lambda: mk.top_logprobs(logits, targets, top))


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_draw(run: Run, top_p: float) -> None:
    rows = NUM_ADAPTERS
    logits = 3 * torch.randn(rows, SHAPE.vocab)
    settings = (
        torch.full((rows,), 0.8),
        torch.full((rows,), SHAPE.vocab),
        torch.full((rows,), top_p, dtype=torch.float64),
        torch.full((rows,), -torch.inf, dtype=torch.float64),
        torch.randint(2**53, (rows,)),
    )
    run(lambda: mk.draw(logits, *settings))
