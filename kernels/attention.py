"""Paged attention on CUDA: prompt chunks on tensor-core tiles, single tokens on split KV.

`out[t, h] = softmax(scale * q[t, h] @ k[: position(t) + 1, h // group].T) @ v`, see `reference`.
q [tokens, heads, head_dim] in fp16, bf16 or fp32; k_blocks, v_blocks [blocks, block_size, kv_heads,
head_dim] in q's dtype, or e4m3 with a scale for each KV head. Last dimensions are contiguous.

The query heads of one KV head lie side by side in a tile, so a tile of BLOCK_ROWS rows holds
BLOCK_ROWS // group queries. KV is walked in tiles at absolute positions, by online softmax. Two
forms, and a sequence's own number of query rows alone chooses between them:

- split, for at most `16 // group` query rows: a program for each segment of KV, and
  `merge_kernel` joins the segments in order. They start at fixed positions, see `segments`.
- chunk: a program for each tile of query rows walks all KV that its last row sees.

A row's bits depend on its sequence, its position and the form; on neighbours never. The two forms
differ in bits: 16 rows go through mma.sync and 128 through wgmma, and the chunk form does not stop
at segments. With `batch_invariant` both use tiles of 64 rows (wgmma on Hopper) and the chunk form
joins segments as the merge does, so a token gets the same bits alone and in any chunk.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .plans import FP8_SM, HEAD_DIMS
from .segments import (
    OCTAVE,
    OCTAVES,
    count_segments,
    count_segments_,
    divide,
    finite,
    join,
    merge_kernel,
    segment_start,
    segment_unit,
)

SHORT_ROWS = 16  # rows (queries x group) up to which a sequence is split over KV
_LOG2_E = 1.4426950408889634
_FP8 = torch.float8_e4m3fn


class Form(NamedTuple):
    """Tile sizes of one form."""

    rows: int
    kv: int
    warps: int
    stages: int


@triton.jit
def _walk(
    state,  # top [rows], total [rows], acc [rows, head_dim] so far
    q,
    positions,  # [rows], the last position that a row sees
    first,  # a multiple of BLOCK_KV
    last,
    log2_scale,
    cache,
    MASKED: tl.constexpr,  # some row does not see all of [first, last)
    BLOCK_SIZE: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Online softmax over the KV tiles of [first, last); logarithms are of base 2."""
    top, total, acc = state
    k_ptr, v_ptr, table_ptr, stride_k_blocks, stride_k_tokens, stride_v_blocks, stride_v_tokens = (
        cache
    )
    offs_kv = tl.arange(0, BLOCK_KV)
    offs_dim = tl.arange(0, acc.shape[1])
    for start in range(first, last, BLOCK_KV):
        place = start + offs_kv
        mask_kv = place < last
        if BLOCK_SIZE % BLOCK_KV == 0:  # the tile lies in one block
            block = tl.load(table_ptr + start // BLOCK_SIZE).to(tl.int64)
            offs_token = start % BLOCK_SIZE + offs_kv
        elif MASKED:
            block = tl.load(table_ptr + place // BLOCK_SIZE, mask=mask_kv, other=0).to(tl.int64)
            offs_token = place % BLOCK_SIZE
        else:
            block = tl.load(table_ptr + place // BLOCK_SIZE).to(tl.int64)
            offs_token = place % BLOCK_SIZE
        offs_k = block * stride_k_blocks + offs_token * stride_k_tokens
        offs_v = block * stride_v_blocks + offs_token * stride_v_tokens
        k_ptrs = k_ptr + offs_k[None, :] + offs_dim[:, None]
        v_ptrs = v_ptr + offs_v[:, None] + offs_dim[None, :]
        if MASKED:
            k = tl.load(k_ptrs, mask=mask_kv[None, :], other=0.0).to(q.dtype)
            v = tl.load(v_ptrs, mask=mask_kv[:, None], other=0.0).to(q.dtype)
        else:
            k = tl.load(k_ptrs).to(q.dtype)
            v = tl.load(v_ptrs).to(q.dtype)
        scores = tl.dot(q, k, input_precision=PRECISION)
        if MASKED:
            seen = mask_kv[None, :] & (place[None, :] <= positions[:, None])
            scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1) * log2_scale)
        keep = tl.exp2(top - finite(higher))
        lower = tl.broadcast_to(-finite(higher)[:, None], scores.shape)
        weights = tl.exp2(tl.fma(scores, tl.full(scores.shape, log2_scale, tl.float32), lower))
        total = tl.fma(total, keep, tl.sum(weights, 1))
        acc = tl.dot(weights.to(q.dtype), v, acc * keep[:, None], input_precision=PRECISION)
        top = higher
    return top, total, acc


@triton.jit
def _attend(
    q,
    positions,
    first,
    middle,  # the KV that every row sees ends here, a multiple of BLOCK_KV
    last,
    log2_scale,
    cache,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Attention over [first, last) alone: top [rows], total [rows], acc [rows, head_dim]."""
    state = (
        tl.full([q.shape[0]], float("-inf"), tl.float32),
        tl.zeros([q.shape[0]], tl.float32),
        tl.zeros(q.shape, tl.float32),
    )
    middle = tl.minimum(tl.maximum(middle, first), last)
    state = _walk(
        state, q, positions, first, middle, log2_scale, cache,
        False, BLOCK_SIZE, BLOCK_KV, PRECISION,
    )  # fmt: skip
    return _walk(
        state, q, positions, middle, last, log2_scale, cache,
        True, BLOCK_SIZE, BLOCK_KV, PRECISION,
    )  # fmt: skip


@triton.jit
def _attend_kernel(
    out_ptr,  # [tokens, heads, head_dim], of the chunk form
    partial_ptr,  # fp32 [segments, seqs, QUERIES, heads, head_dim], of the split form
    stats_ptr,  # fp32 [segments, seqs, QUERIES, heads, 2]: top, total
    q_ptr,
    k_ptr,
    v_ptr,
    table_ptr,
    lens_ptr,
    starts_ptr,
    k_scale_ptr,
    v_scale_ptr,
    log2_scale,
    num_seqs,
    stride_q_tokens,
    stride_q_heads,
    stride_k_blocks,
    stride_k_tokens,
    stride_k_heads,
    stride_v_blocks,
    stride_v_tokens,
    stride_v_heads,
    stride_table_seqs,
    SPLIT: tl.constexpr,
    SEGMENTED: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SHORT: tl.constexpr,  # most query rows of a sequence that is split
    QUERIES: tl.constexpr,
    UNIT: tl.constexpr,
    OCTAVE: tl.constexpr,
    OCTAVES: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    BLOCK_SEQS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    TILE: tl.constexpr = BLOCK_ROWS // GROUP  # queries
    pid_head = tl.program_id(1).to(tl.int64)
    pid_segment = tl.program_id(2)
    if SPLIT:
        seq = tl.program_id(0)
        first_query = 0
    else:
        # The tiles of sequence i begin at starts[i] // TILE + i. The last, longest ones go first.
        pid_tile = tl.num_programs(0) - 1 - tl.program_id(0)
        offs_seq = tl.arange(0, BLOCK_SEQS)
        mask_seq = offs_seq < num_seqs
        starts = tl.load(starts_ptr + offs_seq, mask=mask_seq, other=0)
        seq = tl.sum((mask_seq & (starts // TILE + offs_seq <= pid_tile)).to(tl.int32)) - 1
        first_query = (pid_tile - tl.load(starts_ptr + seq) // TILE - seq) * TILE
    first_token = tl.load(starts_ptr + seq)
    count = tl.load(starts_ptr + seq + 1) - first_token
    if (first_query >= count) | ((count <= SHORT) != SPLIT):
        return
    before = tl.load(lens_ptr + seq) - count  # tokens that were in the cache before this step
    end = before + tl.minimum(first_query + TILE, count)  # of what the last row sees
    middle = (before + first_query + 1) // BLOCK_KV * BLOCK_KV
    if SPLIT:
        begin = segment_start(pid_segment, UNIT, OCTAVE)
        if begin >= end:
            return

    offs_row = tl.arange(0, BLOCK_ROWS)
    offs_dim = tl.arange(0, HEAD_DIM)
    query = first_query + offs_row // GROUP
    head = pid_head * GROUP + offs_row % GROUP
    mask_row = ((offs_row < TILE * GROUP) & (query < count))[:, None]
    token = (first_token + query).to(tl.int64)
    offs_q = token * stride_q_tokens + head * stride_q_heads
    q = tl.load(q_ptr + offs_q[:, None] + offs_dim[None, :], mask=mask_row, other=0.0)
    if k_scale_ptr is not None:
        log2_scale *= tl.load(k_scale_ptr + pid_head)
    positions = before + query
    cache = (
        k_ptr + pid_head * stride_k_heads,
        v_ptr + pid_head * stride_v_heads,
        table_ptr + seq.to(tl.int64) * stride_table_seqs,
        stride_k_blocks,
        stride_k_tokens,
        stride_v_blocks,
        stride_v_tokens,
    )
    if SPLIT:
        end = tl.minimum(end, segment_start(pid_segment + 1, UNIT, OCTAVE))
        top, total, acc = _attend(
            q, positions, begin, middle, end, log2_scale, cache, BLOCK_SIZE, BLOCK_KV, PRECISION
        )
        place = (pid_segment * num_seqs + seq).to(tl.int64) * QUERIES + query
        place = place * HEADS + head
        mask_row = mask_row & (query < QUERIES)[:, None]
        tl.store(partial_ptr + place[:, None] * HEAD_DIM + offs_dim[None, :], acc, mask=mask_row)
        stats = tl.join(top, total)
        tl.store(stats_ptr + place[:, None] * 2 + tl.arange(0, 2)[None, :], stats, mask=mask_row)
        return
    if SEGMENTED:
        top = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_ROWS], tl.float32)
        acc = tl.zeros([BLOCK_ROWS, HEAD_DIM], tl.float32)
        for segment in range(count_segments_(end, UNIT, OCTAVE, OCTAVES)):
            first = segment_start(segment, UNIT, OCTAVE)
            last = tl.minimum(end, segment_start(segment + 1, UNIT, OCTAVE))
            top_next, total_next, acc_next = _attend(
                q, positions, first, middle, last, log2_scale, cache,
                BLOCK_SIZE, BLOCK_KV, PRECISION,
            )  # fmt: skip
            top, total, acc = join(top, total, acc, top_next, total_next, acc_next)
    else:
        top, total, acc = _attend(
            q, positions, 0, middle, end, log2_scale, cache, BLOCK_SIZE, BLOCK_KV, PRECISION
        )
    v_scale = 1.0
    if v_scale_ptr is not None:
        v_scale = tl.load(v_scale_ptr + pid_head)
    out = divide(acc, total, v_scale).to(out_ptr.dtype.element_ty)
    offs_out = (token * HEADS + head)[:, None] * HEAD_DIM + offs_dim[None, :]
    tl.store(out_ptr + offs_out, out, mask=mask_row)


def form(split: bool, batch_invariant: bool, itemsize: int, head_dim: int, sm: int) -> Form:
    """Tile sizes; they depend on the architecture, the op and its shapes alone."""
    if itemsize == 4:  # for tests: no tensor cores, and more rows would spill
        return Form(16, 16, 4, 2)
    # mma.sync, which sm_80 to 89 and 120 have alone, keeps q in registers: 64 would spill.
    kv = 64 if 90 <= sm < 120 or head_dim <= 64 else 32
    if batch_invariant:
        return Form(64, kv, 8, 3)  # 8 warps: with 4 the two accumulators spill
    return Form(SHORT_ROWS, 64, 4, 5) if split else Form(128, kv, 8, 3)


def paged_attention(
    q: Tensor,  # [tokens, heads, head_dim]
    k_blocks: Tensor,  # [blocks, block_size, kv_heads, head_dim]
    v_blocks: Tensor,
    block_table: Tensor,  # int32 [seqs, max_blocks]
    seq_lens: Tensor,  # int32 [seqs]
    query_starts: Tensor,  # int32 [seqs + 1]
    scale: float,
    max_query_len: int,
    max_seq_len: int,
    k_scale: Tensor | None = None,  # fp32 [kv_heads]
    v_scale: Tensor | None = None,
    batch_invariant: bool = False,
    *,
    sm: int,  # compute capability, e.g. 90
    unit: int | None = None,  # tokens of the first segments; None = `segment_unit`
) -> Tensor:  # [tokens, heads, head_dim]
    """See `reference.paged_attention`. The two maxima bound the grid; lengths stay on the device.

    So a CUDA graph may be replayed with any lengths under the maxima that it was captured with.
    """
    _check(q, k_blocks, v_blocks, block_table, sm)
    (tokens, heads, head_dim), kv_heads, num_seqs = q.shape, k_blocks.shape[2], len(seq_lens)
    group, out = heads // kv_heads, q.new_empty(q.shape)
    if 0 in (tokens, num_seqs):
        return out.zero_()
    unit = segment_unit(kv_heads) if unit is None else unit
    segments = count_segments(max_seq_len, unit)
    short = max(1, SHORT_ROWS // group)
    queries = min(short, max_query_len)
    partial = q.new_empty((segments, num_seqs, queries, heads, head_dim), dtype=torch.float32)
    stats = q.new_empty((segments, num_seqs, queries, heads, 2), dtype=torch.float32)
    shared: dict[str, Any] = {
        "HEADS": heads, "GROUP": group, "HEAD_DIM": head_dim, "SHORT": short, "QUERIES": queries,
        "UNIT": unit, "OCTAVE": OCTAVE, "OCTAVES": OCTAVES,
        "BLOCK_SEQS": triton.next_power_of_2(num_seqs), "enable_fp_fusion": False,
    }  # fmt: skip
    for split in (True, False) if max_query_len > short else (True,):
        tile = form(split, batch_invariant, q.itemsize, head_dim, sm)
        rows = max(tile.rows, triton.next_power_of_2(group))
        tiles = num_seqs if split else tokens // (rows // group) + num_seqs
        _attend_kernel[(tiles, kv_heads, segments if split else 1)](
            out, partial, stats, q, k_blocks, v_blocks, block_table, seq_lens, query_starts,
            k_scale, v_scale, scale * _LOG2_E, num_seqs,
            *q.stride()[:2], *k_blocks.stride()[:3], *v_blocks.stride()[:3], block_table.stride(0),
            SPLIT=split, SEGMENTED=batch_invariant, BLOCK_SIZE=k_blocks.shape[1],
            BLOCK_ROWS=rows, BLOCK_KV=tile.kv, PRECISION="ieee" if q.itemsize == 4 else "tf32",
            num_warps=tile.warps, num_stages=tile.stages, **shared,
        )  # fmt: skip
    merge_kernel[(tokens, kv_heads)](
        out, partial, stats, seq_lens, query_starts, v_scale, num_seqs,
        BLOCK_GROUP=triton.next_power_of_2(group), num_warps=4, **shared,
    )  # fmt: skip
    return out


def _check(q: Tensor, k_blocks: Tensor, v_blocks: Tensor, block_table: Tensor, sm: int) -> None:
    head_dim = q.shape[2]
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"head_dim {head_dim}: paged attention on CUDA wants one of {HEAD_DIMS}")
    if k_blocks.dtype != v_blocks.dtype or k_blocks.dtype not in (q.dtype, _FP8):
        raise ValueError(
            f"KV blocks are {k_blocks.dtype} and {v_blocks.dtype}, q is {q.dtype}: store them in "
            "q's dtype or in float8_e4m3fn"
        )
    if k_blocks.dtype == _FP8 and sm < FP8_SM:
        raise ValueError(f"sm_{sm} has no e4m3: keep KV in {q.dtype}, or take an sm_89 or later")
    if any(t.stride(-1) != 1 for t in (q, k_blocks, v_blocks, block_table)):
        raise ValueError("q, KV blocks and block_table must be contiguous in their last dimension")
