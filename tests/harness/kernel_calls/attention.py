"""Arguments of paged attention, of every kind: what nobody may read is NaN."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

MIXED = [(5, 5), (1, 1), (17, 70), (0, 0), (1, 65), (1, 130), (40, 64), (1, 64)]
"""(tokens of this step, tokens in the cache): prompts, chunks, single tokens, and none at all."""


class AttentionCall(NamedTuple):
    """The tensors of `paged_attention`, in its order."""

    q: Tensor
    k_blocks: Tensor
    v_blocks: Tensor
    block_table: Tensor
    seq_lens: Tensor
    query_starts: Tensor

    @property
    def scale(self) -> float:
        """The usual one."""
        return float(self.q.shape[2] ** -0.5)


def make_attention_call(
    lengths: list[tuple[int, int]],
    dtype: torch.dtype,
    *,
    group: int = 2,
    block_size: int = 16,
    kv_dtype: torch.dtype | None = None,
    kv_heads: int = 2,
    head_dim: int = 16,
) -> AttentionCall:
    """Blocks of NaN but for the live tokens, q a view of a wider tensor, gaps between blocks."""
    counts = [-(-length // block_size) for _, length in lengths]
    order = (torch.randperm(sum(counts)) + 1).tolist()
    numel = block_size * kv_heads * head_dim
    pages = torch.full((2, sum(counts) + 2, numel + 32), torch.nan)[..., 16 : 16 + numel]
    pages = pages.unflatten(2, (block_size, kv_heads, head_dim))
    table = torch.zeros(len(lengths), max([0, *counts]) + 1, dtype=torch.int32)
    for i, (_, length) in enumerate(lengths):
        for j in range(counts[i]):
            block = table[i, j] = order.pop()
            live = min(block_size, length - j * block_size)
            pages[:, block, :live] = torch.randn(2, live, kv_heads, head_dim)
    starts = torch.tensor([0, *(count for count, _ in lengths)]).cumsum(0).int()
    fused = torch.randn(int(starts[-1]), kv_heads * (group + 2), head_dim).to(dtype)
    seq_lens = torch.tensor([length for _, length in lengths], dtype=torch.int32)
    k_blocks, v_blocks = pages.to(kv_dtype or dtype)
    q = fused[:, : kv_heads * group]
    return AttentionCall(q, k_blocks, v_blocks, table, seq_lens, starts)


def of_sequences(
    call: AttentionCall, members: list[int], empty: int = 0
) -> tuple[AttentionCall, Tensor]:
    """The call of some of its sequences in that order and `empty` more; the rows they come from."""
    starts = call.query_starts.tolist()
    spans = [torch.arange(starts[i], starts[i + 1]) for i in members]
    counts = [0, *map(len, spans), *[0] * empty]
    table = torch.cat((call.block_table[members], call.block_table[:1].expand(empty, -1)))
    lens = torch.cat((call.seq_lens[members], torch.zeros(empty, dtype=torch.int32)))
    rows = torch.cat(spans)
    part = call._replace(
        q=call.q[rows],
        block_table=table,
        seq_lens=lens,
        query_starts=torch.tensor(counts).cumsum(0).int(),
    )
    return part, rows
