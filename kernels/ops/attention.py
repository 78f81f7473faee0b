"""Attention over blocks of keys and values."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..cpu import attention as cpu
from ..cuda import dispatch as cuda
from ..library import register
from .arguments import check, refuse_gradients


def paged_attention(
    q: Tensor,  # [tokens, heads, head_dim]
    k_blocks: Tensor,  # [blocks, block_size, kv_heads, head_dim], see below for dtypes
    v_blocks: Tensor,
    block_table: Tensor,  # int32 [seqs, max_blocks]
    seq_lens: Tensor,  # int32 [seqs], this step's tokens included
    query_starts: Tensor,  # int32 [seqs + 1], first query row of each, and where the last one ends
    *,
    scale: float,  # of q @ k, usually head_dim ** -0.5
    max_query_len: int,  # bounds of what is in the tensors, for a GPU's grid
    max_seq_len: int,
    k_scale: Tensor | None = None,  # fp32 [kv_heads], of quantised blocks
    v_scale: Tensor | None = None,
    batch_invariant: bool = False,
    out: Tensor | None = None,
) -> Tensor:  # [tokens, heads, head_dim]
    """Causal attention over KV blocks, one op for prompt chunks and single tokens.

    A sequence's query rows are the last of its `seq_lens` tokens. Rows of no sequence become 0.
    Blocks have q's dtype, or int8 on CPU and float8_e4m3fn on CUDA. With `batch_invariant` a token
    has the same bits alone and in any chunk; on CPU it always has. ValueError for shapes that
    disagree, on CUDA also for a head_dim other than 16, 32, 64 and 128. On CPU IndexError, with
    `out` as it was, for query rows, lengths or blocks out of range.
    """
    refuse_gradients(q, k_blocks, v_blocks, k_scale, v_scale)
    check(
        q.dim() == 3 and k_blocks.dim() == 4, "q must be [tokens, heads, dim], blocks 4-dimensional"
    )
    check(k_blocks.shape == v_blocks.shape, "k_blocks and v_blocks must have one shape")
    check(q.shape[1] % k_blocks.shape[2] == 0, "query heads must be a multiple of KV heads")
    found: Tensor = _ATTENTION(
        q, k_blocks, v_blocks, block_table, seq_lens, query_starts, scale,
        max_query_len, max_seq_len, k_scale, v_scale, batch_invariant,
    )  # fmt: skip
    return found if out is None else out.copy_(found)


def _like_q(q: Tensor, *_: Any) -> Tensor:
    return q.new_empty(q.shape)


_ATTENTION = register(
    "paged_attention(Tensor q, Tensor k_blocks, Tensor v_blocks, Tensor block_table, "
    "Tensor seq_lens, Tensor query_starts, float scale, int max_query_len, int max_seq_len, "
    "Tensor? k_scale, Tensor? v_scale, bool batch_invariant=False) -> Tensor",
    cpu=cpu.paged_attention,
    cuda=cuda.paged_attention,
    meta=_like_q,
)
