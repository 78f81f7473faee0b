"""Paged attention on CUDA: prompt chunks on tensor-core tiles, single tokens on split KV.

`out[t, h] = softmax(scale * q[t, h] @ k[: position(t) + 1, h // group].T) @ v`, see `reference`.
q [tokens, heads, head_dim] in fp16, bf16 or fp32; k_blocks, v_blocks [blocks, block_size, kv_heads,
head_dim] in q's dtype, or e4m3 with a scale for each KV head. Last dimensions are contiguous.

The query heads of one KV head lie side by side in a tile, so a tile of BLOCK_ROWS rows holds
BLOCK_ROWS // group queries. KV is walked in tiles at absolute positions, by online softmax. Two
forms, and a sequence's own number of query rows alone chooses between them:

- split, for at most `16 // group` query rows: segments of KV are computed apart, and
  `merge_kernel` joins them in order. They start at fixed positions, see `segments`. Programs share
  out all segments of the batch, which they count on the device: a graph for 131,072 tokens launches
  as many programs as one for 8,192, and none of them is empty while others have two.
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

from .attention_segments import (
    OCTAVE,
    OCTAVES,
    SCALES,
    VARYING,
    attend,
    count_segments,
    count_segments_,
    divide,
    join,
    merge_kernel,
    segment_start,
    segment_unit,
    split_programs,
)
from .launch_plans import FP8_SM, HEAD_DIMS, seq_block

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
def _query_rows(
    q,  # q_ptr, stride_q_tokens, stride_q_heads
    pid_head,
    first_token,
    first_query,
    count,  # queries of the sequence
    GROUP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """q [BLOCK_ROWS, HEAD_DIM], the rows' queries and heads, which rows there are [rows, 1]."""
    q_ptr, stride_q_tokens, stride_q_heads = q
    offs_row = tl.arange(0, BLOCK_ROWS)
    query = first_query + offs_row // GROUP
    head = pid_head * GROUP + offs_row % GROUP
    mask = ((offs_row < BLOCK_ROWS // GROUP * GROUP) & (query < count))[:, None]
    offs = (first_token + query).to(tl.int64) * stride_q_tokens + head * stride_q_heads
    rows = tl.load(q_ptr + offs[:, None] + tl.arange(0, HEAD_DIM)[None, :], mask=mask, other=0.0)
    return rows, query, head, mask


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=SCALES)
def _split_kernel(
    partial_ptr,  # fp32 [segments, seqs, queries, heads, head_dim]
    stats_ptr,  # fp32 [segments, seqs, queries, heads, 2]: m, l
    q,
    k_ptr,
    v_ptr,
    table_ptr,
    lens_ptr,
    starts_ptr,
    k_scale_ptr,
    log2_scale,
    num_seqs,
    queries,  # most query rows of a sequence that is split
    stride_table_seqs,
    strides,  # of K, of V (blocks, tokens, heads each)
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    UNIT: tl.constexpr,
    OCTAVE: tl.constexpr,
    OCTAVES: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    BLOCK_SEQS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """acc, m and l of each segment of KV alone, for sequences of at most SHORT query rows.

    Grid: (programs, KV heads); a program takes every num_programs(0)-th of all segments. q [tokens,
    HEADS, HEAD_DIM] with its strides, k and v [blocks, BLOCK_SIZE, KV heads, HEAD_DIM], table int32
    [seqs, max_blocks], lens int32 [seqs], starts int32 [seqs + 1], k_scale fp32 [KV heads] or None.
    log2_scale: of the scores, times log2(e).
    """
    k_blocks, k_tokens, k_heads, v_blocks, v_tokens, v_heads = strides
    pid_head = tl.program_id(1).to(tl.int64)
    offs_seq = tl.arange(0, BLOCK_SEQS)
    mask_seq = offs_seq < num_seqs
    starts = tl.load(starts_ptr + offs_seq, mask=mask_seq, other=0)
    counts = tl.load(starts_ptr + 1 + offs_seq, mask=mask_seq, other=0) - starts
    lens = tl.load(lens_ptr + offs_seq, mask=mask_seq, other=0)
    segments = count_segments_(lens, UNIT, OCTAVE, OCTAVES)
    segments = tl.where((counts > 0) & (counts <= queries), segments, 0)
    ends = tl.cumsum(segments, 0)
    if k_scale_ptr is not None:
        log2_scale *= tl.load(k_scale_ptr + pid_head)
    offs_dim = tl.arange(0, HEAD_DIM)
    for work in range(tl.program_id(0), tl.sum(segments), tl.num_programs(0)):
        seq = tl.sum((ends <= work).to(tl.int32))
        segment = work - tl.max(tl.where(ends <= work, ends, 0))
        first_token = tl.load(starts_ptr + seq)
        count = tl.load(starts_ptr + seq + 1) - first_token
        end = tl.load(lens_ptr + seq)
        before = end - count  # tokens that were in the cache before this step
        rows, query, head, mask = _query_rows(
            q, pid_head, first_token, 0, count, GROUP, BLOCK_ROWS, HEAD_DIM
        )
        cache = (
            k_ptr + pid_head * k_heads, v_ptr + pid_head * v_heads,
            table_ptr + seq.to(tl.int64) * stride_table_seqs,
            k_blocks, k_tokens, v_blocks, v_tokens,
        )  # fmt: skip
        first = segment_start(segment, UNIT, OCTAVE)
        last = tl.minimum(end, segment_start(segment + 1, UNIT, OCTAVE))
        m, l, acc = attend(
            rows, before + query, first, (before + 1) // BLOCK_KV * BLOCK_KV, last, log2_scale,
            cache, BLOCK_SIZE, BLOCK_KV, PRECISION,
        )  # fmt: skip
        place = (segment * num_seqs + seq) * queries + query
        place = (place.to(tl.int64) * HEADS + head)[:, None]
        tl.store(partial_ptr + place * HEAD_DIM + offs_dim[None, :], acc, mask=mask)
        stats = tl.join(m, l)
        tl.store(stats_ptr + place * 2 + tl.arange(0, 2)[None, :], stats, mask=mask)


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=SCALES)
def _chunk_kernel(
    out_ptr,  # [tokens, heads, head_dim]
    q,
    k_ptr,
    v_ptr,
    table_ptr,
    lens_ptr,
    starts_ptr,
    k_scale_ptr,
    v_scale_ptr,
    log2_scale,
    num_seqs,
    stride_table_seqs,
    strides,  # as in `_split_kernel`
    SEGMENTED: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SHORT: tl.constexpr,  # most query rows of a sequence that is split
    UNIT: tl.constexpr,
    OCTAVE: tl.constexpr,
    OCTAVES: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    BLOCK_SEQS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out = softmax(scale * q k^T) v of sequences of more than SHORT query rows.

    Grid: (tiles of query rows, KV heads); a program walks all KV that its last row sees. out like
    q, v_scale like k_scale, the rest as in `_split_kernel`. SEGMENTED: by segments, joined as
    `merge_kernel` joins them.
    """
    TILE: tl.constexpr = BLOCK_ROWS // GROUP  # queries
    k_blocks, k_tokens, k_heads, v_blocks, v_tokens, v_heads = strides
    pid_head = tl.program_id(1).to(tl.int64)
    # The tiles of sequence i begin at starts[i] // TILE + i. The last, longest ones go first.
    pid_tile = tl.num_programs(0) - 1 - tl.program_id(0)
    offs_seq = tl.arange(0, BLOCK_SEQS)
    mask_seq = offs_seq < num_seqs
    starts = tl.load(starts_ptr + offs_seq, mask=mask_seq, other=0)
    seq = tl.sum((mask_seq & (starts // TILE + offs_seq <= pid_tile)).to(tl.int32)) - 1
    first_token = tl.load(starts_ptr + seq)
    first_query = (pid_tile - first_token // TILE - seq) * TILE
    count = tl.load(starts_ptr + seq + 1) - first_token
    if (first_query >= count) | (count <= SHORT):
        return
    before = tl.load(lens_ptr + seq) - count  # tokens that were in the cache before this step
    end = before + tl.minimum(first_query + TILE, count)  # of what the last row sees
    middle = (before + first_query + 1) // BLOCK_KV * BLOCK_KV
    rows, query, head, mask = _query_rows(
        q, pid_head, first_token, first_query, count, GROUP, BLOCK_ROWS, HEAD_DIM
    )
    if k_scale_ptr is not None:
        log2_scale *= tl.load(k_scale_ptr + pid_head)
    cache = (
        k_ptr + pid_head * k_heads, v_ptr + pid_head * v_heads,
        table_ptr + seq.to(tl.int64) * stride_table_seqs,
        k_blocks, k_tokens, v_blocks, v_tokens,
    )  # fmt: skip
    positions = before + query
    if SEGMENTED:
        m = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
        l = tl.zeros([BLOCK_ROWS], tl.float32)
        acc = tl.zeros([BLOCK_ROWS, HEAD_DIM], tl.float32)
        for segment in range(count_segments_(end, UNIT, OCTAVE, OCTAVES)):
            first = segment_start(segment, UNIT, OCTAVE)
            last = tl.minimum(end, segment_start(segment + 1, UNIT, OCTAVE))
            m_next, l_next, acc_next = attend(
                rows, positions, first, middle, last, log2_scale, cache,
                BLOCK_SIZE, BLOCK_KV, PRECISION,
            )  # fmt: skip
            m, l, acc = join(m, l, acc, m_next, l_next, acc_next)
    else:
        m, l, acc = attend(
            rows, positions, 0, middle, end, log2_scale, cache, BLOCK_SIZE, BLOCK_KV, PRECISION
        )
    v_scale = 1.0
    if v_scale_ptr is not None:
        v_scale = tl.load(v_scale_ptr + pid_head)
    out = divide(acc, l, v_scale).to(out_ptr.dtype.element_ty)
    offs_out = ((first_token + query).to(tl.int64) * HEADS + head)[:, None] * HEAD_DIM
    tl.store(out_ptr + offs_out + tl.arange(0, HEAD_DIM)[None, :], out, mask=mask)


def form(split: bool, batch_invariant: bool, itemsize: int, head_dim: int, sm: int) -> Form:
    """Tile sizes; they depend on the architecture, the op and its shapes alone."""
    if itemsize == 4:  # for tests: no tensor cores, and more rows would spill
        return Form(16, 16, 4, 2)
    # mma.sync, which sm_80 to 89 and 120 have alone, keeps q in registers: 64 would spill.
    kv = 64 if 90 <= sm < 120 or head_dim <= 64 else 32
    if batch_invariant:
        return Form(64, kv, 8, 3)  # 8 warps: with 4 the two accumulators spill
    return Form(SHORT_ROWS, kv, 4, 5) if split else Form(128, kv, 8, 3)


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
        "HEADS": heads, "GROUP": group, "HEAD_DIM": head_dim,
        "UNIT": unit, "OCTAVE": OCTAVE, "OCTAVES": OCTAVES,
        "BLOCK_SEQS": seq_block(num_seqs), "enable_fp_fusion": False,
    }  # fmt: skip
    inputs = (
        (q, *q.stride()[:2]), k_blocks, v_blocks, block_table, seq_lens, query_starts, k_scale,
    )  # fmt: skip
    strides = (*k_blocks.stride()[:3], *v_blocks.stride()[:3])
    table_seqs = block_table.stride(0)
    for split in (True, False) if max_query_len > short else (True,):
        tile = form(split, batch_invariant, q.itemsize, head_dim, sm)
        rows = max(tile.rows, triton.next_power_of_2(group))
        tiling: dict[str, Any] = {
            "BLOCK_SIZE": k_blocks.shape[1], "BLOCK_ROWS": rows, "BLOCK_KV": tile.kv,
            "PRECISION": "ieee" if q.itemsize == 4 else "tf32",
            "num_warps": tile.warps, "num_stages": tile.stages, **shared,
        }  # fmt: skip
        if split:
            grid = (split_programs(segments * num_seqs, kv_heads), kv_heads)
            _split_kernel[grid](
                partial, stats, *inputs, scale * _LOG2_E, num_seqs, queries, table_seqs, strides,
                **tiling,
            )  # fmt: skip
        else:
            _chunk_kernel[(tokens // (rows // group) + num_seqs, kv_heads)](
                out, *inputs, v_scale, scale * _LOG2_E, num_seqs, table_seqs, strides,
                SEGMENTED=batch_invariant, SHORT=short, **tiling,
            )  # fmt: skip
    merge_kernel[(tokens, kv_heads)](
        out, partial, stats, seq_lens, query_starts, v_scale, num_seqs, queries,
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
