"""Paged attention on CPU: in C++, and in vectorised torch where that cannot do it.

Both keep rows apart: see `row_independence`. Keys and values are read in tiles of 64 at fixed
positions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import index_checks, reference
from . import graph, native
from .row_independence import flat, padded

KV_TILE = 64


def paged_attention(
    q: Tensor,
    k_blocks: Tensor,
    v_blocks: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_starts: Tensor,
    scale: float,
    max_query_len: int,  # bounds of a GPU's grid
    max_seq_len: int,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    batch_invariant: bool = False,  # on CPU always
) -> Tensor:
    """See `reference.paged_attention`: sequences with as many query rows are computed together."""
    where, scales = (block_table, seq_lens, query_starts), (k_scale, v_scale)
    if native.LIB is not None and _cpp_can(q, k_blocks, v_blocks, where, scales):
        return _cpp_attention(q, k_blocks, v_blocks, where, scale, scales)
    index_checks.check_attention(q, k_blocks, *where)
    out = torch.zeros(q.shape, dtype=q.dtype)
    starts = query_starts.tolist()
    groups: dict[int, list[int]] = {}
    for i in range(len(seq_lens)):
        groups.setdefault(starts[i + 1] - starts[i], []).append(i)
    for count, members in groups.items():
        if count == 0:
            continue
        # One long prompt at a time; single-token rows all together.
        batches = [members] if count == 1 else [[i] for i in members]
        for batch in batches:
            rows = torch.tensor([range(starts[i], starts[i + 1]) for i in batch])
            index = torch.tensor(batch)
            out[rows] = _attend(
                q[rows],
                k_blocks,
                v_blocks,
                block_table[index],
                seq_lens[index],
                scale,
                *scales,
            )
    return out


def _cpp_can(
    q: Tensor,
    k_blocks: Tensor,
    v_blocks: Tensor,
    where: tuple[Tensor, Tensor, Tensor],  # block_table, seq_lens, query_starts
    scales: tuple[Tensor | None, Tensor | None],
) -> bool:
    """Whether types and layouts are those that the C++ form takes."""
    dim, table = q.shape[2], where[0]
    return (
        q.dtype in native.DTYPE_CODES
        and k_blocks.dtype in native.KV_CODES
        and k_blocks.dtype == v_blocks.dtype
        and k_blocks.stride() == v_blocks.stride()
        and k_blocks.shape[3] == dim
        and q.stride()[1:] == (dim, 1) == k_blocks.stride()[2:]
        and table.dim() == 2
        and len(table) == len(where[1]) == len(where[2]) - 1
        and all(t.dtype == torch.int32 and t.is_contiguous() for t in where)
        and all(
            s is None
            or (s.dtype == torch.float32 and s.shape == k_blocks.shape[2:3] and s.is_contiguous())
            for s in scales
        )
    )


def _cpp_attention(
    q: Tensor,
    k_blocks: Tensor,
    v_blocks: Tensor,
    where: tuple[Tensor, Tensor, Tensor],
    scale: float,
    scales: tuple[Tensor | None, Tensor | None],
) -> Tensor:
    out = graph.empty(q.shape, q.dtype)
    tokens, heads, dim = q.shape
    blocks, block_size, kv_heads, _ = k_blocks.shape
    block_stride, token_stride, _, _ = k_blocks.stride()
    block_table, seq_lens, query_starts = where
    args = native.AttentionArgs(
        out=out.data_ptr(),
        q=q.data_ptr(),
        q_stride=q.stride(0),
        k=k_blocks.data_ptr(),
        v=v_blocks.data_ptr(),
        block_stride=block_stride,
        token_stride=token_stride,
        k_scale=native.pointer(scales[0]),
        v_scale=native.pointer(scales[1]),
        block_table=block_table.data_ptr(),
        seq_lens=seq_lens.data_ptr(),
        query_starts=query_starts.data_ptr(),
        tokens=tokens,
        seqs=len(seq_lens),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=dim,
        blocks=blocks,
        block_size=block_size,
        max_blocks=block_table.shape[1],
        scale=scale,
        dtype=native.DTYPE_CODES[q.dtype],
        kv_dtype=native.KV_CODES[k_blocks.dtype],
        num_threads=torch.get_num_threads(),
    )
    graph.call("paged_attention", args, out, q, k_blocks, v_blocks, *where, *scales)
    return out


def _attend(
    q: Tensor,  # [seqs, queries, heads, head_dim]
    k_blocks: Tensor,
    v_blocks: Tensor,
    block_table: Tensor,  # [seqs, max_blocks]
    seq_lens: Tensor,  # [seqs]
    scale: float,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> Tensor:  # [seqs, queries, heads, head_dim]
    """Online softmax over KV tiles at fixed positions, query rows padded to 16.

    m is the largest score yet, l the sum of the weights `exp(score - m)`.
    """
    seqs, queries, heads, dim = q.shape
    block_size, kv_heads = k_blocks.shape[1:3]
    group = heads // kv_heads
    rows = queries * group
    # [seqs, kv_heads, rows, dim]: the query heads that share a KV head, query-major.
    x = (
        q.reshape(seqs, queries, kv_heads, group, dim)
        .permute(0, 2, 1, 3, 4)
        .reshape(seqs, kv_heads, rows, dim)
    )
    x = F.pad(x.float() * scale, (0, 0, 0, padded(rows) - rows)).reshape(seqs * kv_heads, -1, dim)
    last = (seq_lens.long()[:, None] - queries + torch.arange(queries)).repeat_interleave(group, 1)
    last = F.pad(last, (0, padded(rows) - rows))[
        :, None, :, None
    ]  # last visible position of each row
    shape = (seqs, kv_heads, x.shape[1], 1)
    m = torch.full(shape, -1e30)
    l = torch.zeros(shape)
    acc = torch.zeros(*shape[:3], dim)
    longest = int(seq_lens.max())
    for start in range(0, longest, KV_TILE):
        positions = torch.arange(start, start + KV_TILE)
        block = (positions // block_size).clamp_(max=block_table.shape[1] - 1)
        live = positions < seq_lens[:, None]
        blocks = torch.where(live, block_table[:, block], 0).long()  # [seqs, tile]
        k = _tile(k_blocks, blocks, positions % block_size, live, k_scale, are_keys=True)
        v = _tile(v_blocks, blocks, positions % block_size, live, v_scale)
        scores = torch.bmm(x, k.transpose(1, 2)).view(*shape[:3], KV_TILE)
        scores = scores.masked_fill_(positions > last, float("-inf"))
        higher = torch.maximum(m, scores.amax(-1, keepdim=True))
        keep = flat(torch.exp, m - higher)
        weights = flat(torch.exp, scores - higher)
        l = l * keep + weights.sum(-1, keepdim=True)
        acc = acc * keep + torch.bmm(weights.flatten(0, 1), v).view_as(acc)
        m = higher
    found = (acc / l)[:, :, :rows].reshape(seqs, kv_heads, queries, group, dim)
    return found.permute(0, 2, 1, 3, 4).reshape(seqs, queries, heads, dim).to(q.dtype)


def _tile(
    pages: Tensor,
    blocks: Tensor,
    offsets: Tensor,
    live: Tensor,
    scale: Tensor | None,
    *,
    are_keys: bool = False,
) -> Tensor:
    """One KV tile as fp32 [seqs * kv_heads, tile, head_dim], zero where a sequence has ended."""
    found = pages[blocks, offsets]  # [seqs, tile, kv_heads, head_dim]
    tile = reference.read_keys(found, torch.float32) if are_keys else found.float()
    if scale is not None:
        tile = tile * scale[:, None]
    tile = torch.where(live[..., None, None], tile, 0.0)
    return tile.transpose(1, 2).flatten(0, 1)
