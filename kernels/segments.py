"""Segments of KV: where they start, how attention over each is joined in order.

A row's attention over [0, n) is computed segment by segment, each by an online softmax of its own:
`top` (log2 of the largest weight), `total` (sum of weights) and `acc` (weighted sum of v), all
relative to `top`. Boundaries are fixed positions: OCTAVE segments of UNIT tokens, OCTAVE more, and
then lengths double. So rows of one sequence see prefixes of one list of segments, 131,072 tokens
are 80 of them, and the longest is a 32nd of the context.
"""

from __future__ import annotations

import triton
import triton.language as tl

OCTAVE = 16  # segments of one length before it doubles
OCTAVES = 12  # doublings that kernels count: positions beyond any context


@triton.jit
def segment_start(segment, UNIT: tl.constexpr, OCTAVE: tl.constexpr):
    """First KV position: OCTAVE segments of UNIT, as many again, then lengths double."""
    doubled = tl.maximum(segment // OCTAVE - 1, 0)
    steps = tl.where(segment < OCTAVE, segment, OCTAVE + segment % OCTAVE)
    return (steps * UNIT) << doubled


@triton.jit
def count_segments_(length, UNIT: tl.constexpr, OCTAVE: tl.constexpr, OCTAVES: tl.constexpr):
    """Segments that start before `length`."""
    count = tl.minimum(tl.cdiv(length, UNIT), OCTAVE)
    for octave in tl.static_range(OCTAVES):
        beyond = tl.maximum(length - ((OCTAVE * UNIT) << octave), 0)
        count += tl.minimum(tl.cdiv(beyond, UNIT << octave), OCTAVE)
    return count


@triton.jit
def finite(top):
    """`top`, with 0 for rows that have seen nothing: -inf - -inf would be NaN."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def join(top, total, acc, top_next, total_next, acc_next):
    """Adds a later segment to those before it. With fma it is written what is rounded when."""
    higher = tl.maximum(top, top_next)
    keep, add = tl.exp2(top - finite(higher)), tl.exp2(top_next - finite(higher))
    total = tl.fma(total, keep, total_next * add)
    acc = tl.fma(acc, tl.broadcast_to(keep[:, None], acc.shape), acc_next * add[:, None])
    return higher, total, acc


@triton.jit
def divide(acc, total, v_scale):
    return acc / tl.where(total == 0.0, 1.0, total)[:, None] * v_scale


@triton.jit
def merge_kernel(
    out_ptr,  # [tokens, heads, head_dim]
    partial_ptr,  # fp32 [segments, seqs, QUERIES, heads, head_dim]
    stats_ptr,  # fp32 [segments, seqs, QUERIES, heads, 2]
    lens_ptr,
    starts_ptr,
    v_scale_ptr,
    num_seqs,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SHORT: tl.constexpr,
    QUERIES: tl.constexpr,
    UNIT: tl.constexpr,
    OCTAVE: tl.constexpr,
    OCTAVES: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK_SEQS: tl.constexpr,
):
    """Joins the segments of one token in order; tokens of no sequence become 0."""
    pid_token = tl.program_id(0)
    pid_head = tl.program_id(1).to(tl.int64)
    offs_seq = tl.arange(0, BLOCK_SEQS)
    mask_seq = offs_seq < num_seqs
    ends = tl.load(starts_ptr + 1 + offs_seq, mask=mask_seq, other=0)
    seq = tl.sum((mask_seq & (ends <= pid_token)).to(tl.int32))
    offs_group = tl.arange(0, BLOCK_GROUP)
    offs_dim = tl.arange(0, HEAD_DIM)
    head = pid_head * GROUP + offs_group
    mask_head = (offs_group < GROUP)[:, None]
    offs_out = (pid_token.to(tl.int64) * HEADS + head)[:, None] * HEAD_DIM + offs_dim[None, :]
    acc = tl.zeros([BLOCK_GROUP, HEAD_DIM], tl.float32)
    if seq == num_seqs:
        tl.store(out_ptr + offs_out, acc.to(out_ptr.dtype.element_ty), mask=mask_head)
        return
    first_token = tl.load(starts_ptr + seq)
    count = tl.load(starts_ptr + seq + 1) - first_token
    if count > SHORT:
        return
    query = pid_token - first_token
    length = tl.load(lens_ptr + seq) - count + query + 1
    top = tl.full([BLOCK_GROUP], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_GROUP], tl.float32)
    for segment in tl.range(count_segments_(length, UNIT, OCTAVE, OCTAVES), num_stages=4):
        place = ((segment * num_seqs + seq).to(tl.int64) * QUERIES + query) * HEADS + head
        partial_ptrs = partial_ptr + place[:, None] * HEAD_DIM + offs_dim[None, :]
        acc_next = tl.load(partial_ptrs, mask=mask_head, other=0.0)
        top_next = tl.load(stats_ptr + place * 2, mask=offs_group < GROUP, other=0.0)
        total_next = tl.load(stats_ptr + place * 2 + 1, mask=offs_group < GROUP, other=0.0)
        top, total, acc = join(top, total, acc, top_next, total_next, acc_next)
    v_scale = 1.0
    if v_scale_ptr is not None:
        v_scale = tl.load(v_scale_ptr + pid_head)
    out = divide(acc, total, v_scale).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + offs_out, out, mask=mask_head)


def segment_unit(kv_heads: int) -> int:
    """Tokens of the first segments: a batch of one 8,192-token sequence must fill a GPU."""
    return 512 if kv_heads > 4 else 256


def count_segments(length: int, unit: int) -> int:
    """Segments that start before `length`, on the host."""
    octaves = [(0, unit)] + [(OCTAVE * unit << n, unit << n) for n in range(OCTAVES)]
    return sum(min(-(-max(length - start, 0) // step), OCTAVE) for start, step in octaves)
