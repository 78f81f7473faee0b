"""Paged attention on a GPU beside torch's own, for the parts "kernels" and "profile".

Torch's gets K and V laid out contiguously, which is better than it would find them in an engine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import gpu_model
import torch
import torch.nn.functional as F
from gpu_timing import EVICT, Bench, l2_bytes, sets_of
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from work import Shape

import multilora_kernels as mk

BLOCK_SIZE = 16
BACKENDS = {
    "torch flash": SDPBackend.FLASH_ATTENTION,
    "torch cudnn": SDPBackend.CUDNN_ATTENTION,
    "torch efficient": SDPBackend.EFFICIENT_ATTENTION,
}
TOLERANCE = 0.02  # of the largest value


@dataclass(frozen=True)
class Attention:
    """A shape of attention: the last `queries` tokens of `seqs` sequences of `length` tokens."""

    seqs: int
    length: int
    queries: int
    heads: int = 32
    kv_heads: int = 8
    dim: int = 128

    def __str__(self) -> str:
        return f"attention, {self.seqs} x {self.length}, {self.queries} queries each"

    @property
    def kernels(self) -> list[gpu_model.Kernel]:
        """What the model expects of it."""
        shape = Shape(1, 0, self.heads, self.kv_heads, self.dim, 0, 0)
        chunk = gpu_model.Chunk(self.queries, self.length)
        return gpu_model.attention(shape, gpu_model.Step((chunk,) * self.seqs))


class Problem:
    """Queries and several sets of KV pages, in shuffled order."""

    def __init__(
        self, case: Attention, dtype: torch.dtype, device: torch.device, cold: int
    ) -> None:
        blocks = case.seqs * case.length // BLOCK_SIZE
        shape = (2, blocks, BLOCK_SIZE, case.kv_heads, case.dim)
        rows = case.seqs * case.queries

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=dtype, device=device)

        self.case, self.scale = case, case.dim**-0.5
        self.bytes = 2 * blocks * BLOCK_SIZE * case.kv_heads * case.dim * dtype.itemsize
        self.sets = [normal(*shape) for _ in range(sets_of(self.bytes, cold))]
        self.q = normal(rows, case.heads, case.dim)
        self.table = torch.randperm(blocks, device=device).view(case.seqs, -1).int()
        self.lens = torch.full((case.seqs,), case.length, dtype=torch.int32, device=device)
        self.starts = (torch.arange(case.seqs + 1, device=device) * case.queries).int()

    def ours(self, kv: Tensor) -> Callable[[], Tensor]:
        return lambda: mk.paged_attention(
            self.q,
            *kv.unbind(0),
            self.table,
            self.lens,
            self.starts,
            scale=self.scale,
            max_query_len=self.case.queries,
            max_seq_len=self.case.length,
        )

    def torchs(self, kv: Tensor, backend: SDPBackend) -> Callable[[], Tensor]:
        """A single query's heads that share K and V go as queries of one head: KV is read once."""
        case = self.case
        pages = kv[:, self.table.long()].view(2, case.seqs, case.length, case.kv_heads, case.dim)
        k, v = pages.transpose(2, 3).contiguous().unbind(0)
        is_prompt = case.queries > 1
        q = self.q.view(case.seqs, case.kv_heads, -1, case.dim)
        if is_prompt:
            q = self.q.view(case.seqs, case.queries, case.heads, case.dim).transpose(1, 2)

        def call() -> Tensor:
            with sdpa_kernel(backend):
                out = F.scaled_dot_product_attention(
                    q, k, v, is_causal=is_prompt, scale=self.scale, enable_gqa=is_prompt
                )
            return (out.transpose(1, 2) if is_prompt else out).reshape(self.q.shape)

        return call


def attend(case: Attention, dtype: torch.dtype, repeat: int, bench: Bench) -> None:
    """Times a case, ours and torch's by every backend that takes it and gives the same."""
    bench.clock.case = case
    problem = Problem(case, dtype, bench.device.torch, EVICT * l2_bytes(bench.device))
    times = bench.clock.of_graph([problem.ours(kv) for kv in problem.sets], repeat)
    found: dict[str, object] = {"microseconds": [round(t * 1e6, 3) for t in times]}
    comparators: dict[str, float] = {}
    # A chunk that ends a longer sequence is not what torch's is_causal means.
    backends = BACKENDS if case.queries in (1, case.length) else {}
    for name, backend in backends.items():
        try:
            theirs = [problem.torchs(kv, backend) for kv in problem.sets]
            expected, got = theirs[0]().float(), problem.ours(problem.sets[0])().float()
            wrong = float((got - expected).abs().max() / expected.abs().max())
            if not wrong <= TOLERANCE:
                raise ArithmeticError(f"ours differs from it by {wrong:.2%}")
            found[name] = round(bench.clock.of_graph(theirs, repeat)[0] * 1e6, 3)
            comparators[name] = float(str(found[name]))
        except Exception as error:  # a backend that does not take this
            found[name] = f"{type(error).__name__}: {error}"[:300]
    predicted = sum(kernel.in_step_us(bench.card) for kernel in case.kernels)
    bench.report.add(
        kind="attention",
        **vars(case),
        percent_of_copy=round(100 * problem.bytes / times[0] / bench.copy, 1),
        teraflops=round(case.kernels[0].flops / times[0] / 1e12, 3),
        **found,
        **bench.judge.beside(str(case), times[0] * 1e6, predicted, comparators=comparators),
    )
