"""Segments of KV: where they start, attention over one, how they are joined in order.

A row's attention over [0, n) is computed segment by segment, each by an online softmax of its own:
`m` (log2 of the largest weight), `l` (sum of weights) and `acc` (weighted sum of v), all
relative to `m`. Boundaries are fixed positions: OCTAVE segments of UNIT tokens, OCTAVE more, and
then lengths double. So rows of one sequence see prefixes of one list of segments, 131,072 tokens
are 80 of them, and the longest is a 32nd of the context.
"""

from __future__ import annotations

import triton
import triton.language as tl

OCTAVE = 16  # segments of one length before it doubles
FULL_GRID = 512  # programs that fill a GPU: two on a multiprocessor, and spare ones
OCTAVES = 12  # doublings that kernels count: positions beyond any context
VARYING = ("num_seqs", "queries", "stride_table_seqs")
"""Arguments that differ from step to step: no variant may be compiled for one that is 1, or a
multiple of 16."""
SCALES = ("k_scale_ptr", "v_scale_ptr")
"""Those of a layer may begin at any multiple of 4 bytes, and are read one by one."""


@triton.jit
def _widened(x, dtype: tl.constexpr):
    """x in q's dtype; e4m3 by way of fp16, which holds it exactly.

    From e4m3 to bf16 at once Triton 3.6 writes an instruction that sm_89 has not.
    """
    if x.dtype.is_fp8():
        x = x.to(tl.float16)
    return x.to(dtype)


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
def finite(m):
    """`m`, with 0 for rows that have seen nothing: -inf - -inf would be NaN."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def _walk(
    state,  # m [rows], l [rows], acc [rows, head_dim] so far
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
    """Online softmax over the KV tiles of [first, last); logarithms are of base 2.

    For each tile: m' = max(m, max(s)), l = l 2^(m - m') + sum 2^(s - m'), acc = acc 2^(m - m') +
    2^(s - m') v, where s = log2_scale q k^T. cache: pointers of one KV head's k and v and of the
    sequence's row of the block table, then strides of k and v from block to block, token to token.
    """
    m, l, acc = state
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
            k = _widened(tl.load(k_ptrs, mask=mask_kv[None, :], other=0.0), q.dtype)
            v = _widened(tl.load(v_ptrs, mask=mask_kv[:, None], other=0.0), q.dtype)
        else:
            k = _widened(tl.load(k_ptrs), q.dtype)
            v = _widened(tl.load(v_ptrs), q.dtype)
        scores = tl.dot(q, k, input_precision=PRECISION)
        if MASKED:
            seen = mask_kv[None, :] & (place[None, :] <= positions[:, None])
            scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(m, tl.max(scores, 1) * log2_scale)
        keep = tl.exp2(m - finite(higher))
        lower = tl.broadcast_to(-finite(higher)[:, None], scores.shape)
        weights = tl.exp2(tl.fma(scores, tl.full(scores.shape, log2_scale, tl.float32), lower))
        l = tl.fma(l, keep, tl.sum(weights, 1))
        acc = tl.dot(weights.to(q.dtype), v, acc * keep[:, None], input_precision=PRECISION)
        m = higher
    return m, l, acc


@triton.jit
def attend(
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
    """Attention over positions [first, last) alone: m [rows], l [rows], acc [rows, head_dim].

    q [rows, head_dim], positions [rows] the last position that each row sees, cache as `_walk`.
    """
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
def join(m, l, acc, m_next, l_next, acc_next):
    """Adds a later segment to those before it. With fma it is written what is rounded when."""
    higher = tl.maximum(m, m_next)
    keep, add = tl.exp2(m - finite(higher)), tl.exp2(m_next - finite(higher))
    l = tl.fma(l, keep, l_next * add)
    acc = tl.fma(acc, tl.broadcast_to(keep[:, None], acc.shape), acc_next * add[:, None])
    return higher, l, acc


@triton.jit
def divide(acc, l, v_scale):
    """acc / l * v_scale [rows, head_dim]; rows that have seen nothing become 0."""
    return acc / tl.where(l == 0.0, 1.0, l)[:, None] * v_scale


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=SCALES)
def merge_kernel(
    out_ptr,  # [tokens, heads, head_dim]
    partial_ptr,  # fp32 [segments, seqs, queries, heads, head_dim]
    stats_ptr,  # fp32 [segments, seqs, queries, heads, 2]
    lens_ptr,
    starts_ptr,
    v_scale_ptr,
    num_seqs,
    queries,  # most query rows of a sequence that was split
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    UNIT: tl.constexpr,
    OCTAVE: tl.constexpr,
    OCTAVES: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK_SEQS: tl.constexpr,
):
    """out = the segments of one token, joined in order; tokens of no sequence become 0.

    Grid: (tokens, KV heads). partial and stats are what `_split_kernel` wrote, lens int32 [seqs],
    starts int32 [seqs + 1], v_scale fp32 [KV heads] or None.
    """
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
    if count > queries:
        return
    query = pid_token - first_token
    length = tl.load(lens_ptr + seq) - count + query + 1
    m = tl.full([BLOCK_GROUP], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_GROUP], tl.float32)
    for segment in tl.range(count_segments_(length, UNIT, OCTAVE, OCTAVES), num_stages=4):
        place = ((segment * num_seqs + seq).to(tl.int64) * queries + query) * HEADS + head
        partial_ptrs = partial_ptr + place[:, None] * HEAD_DIM + offs_dim[None, :]
        acc_next = tl.load(partial_ptrs, mask=mask_head, other=0.0)
        m_next = tl.load(stats_ptr + place * 2, mask=offs_group < GROUP, other=0.0)
        l_next = tl.load(stats_ptr + place * 2 + 1, mask=offs_group < GROUP, other=0.0)
        m, l, acc = join(m, l, acc, m_next, l_next, acc_next)
    v_scale = 1.0
    if v_scale_ptr is not None:
        v_scale = tl.load(v_scale_ptr + pid_head)
    out = divide(acc, l, v_scale).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + offs_out, out, mask=mask_head)


def segment_unit(kv_heads: int) -> int:
    """Tokens of the first segments: a batch of one 8,192-token sequence must fill a GPU."""
    return 512 if kv_heads > 4 else 256


def split_programs(most: int, kv_heads: int) -> int:
    """Programs of a KV head that share out at most so many segments."""
    return min(most, max(FULL_GRID // kv_heads, 1))


def count_segments(length: int, unit: int) -> int:
    """Segments that start before `length`, on the host."""
    octaves = [(0, unit)] + [(OCTAVE * unit << n, unit << n) for n in range(OCTAVES)]
    return sum(min(-(-max(length - start, 0) // step), OCTAVE) for start, step in octaves)
