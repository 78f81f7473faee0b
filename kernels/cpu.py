"""The ops on CPU in vectorised torch, and in C++ where the library was built.

Every row's bits depend on that row alone, for one machine, build and thread count. What breaks
that in torch, as measured (AVX2, torch 2.13): GEMMs of few rows choose other kernels (so rows come
padded to 16), `exp` and `silu` treat the tail of a flat buffer and the borders between threads by
other code (so `_flat` feeds them whole vectors below the size at which torch splits work), and a
product with 8 rank rows differs from the same rows inside 64 (so LoRA goes page by page).
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from . import native, reference

logger = logging.getLogger(__name__)

ROWS = 16
KV_TILE = 64
CPP_DTYPES = (torch.float32, torch.bfloat16)
_SERIAL = 32_768  # elements below which torch's elementwise ops use one thread


def padded(count: int) -> int:
    return -(-count // ROWS) * ROWS


def threads_for(work: int) -> int:
    """Threads for so many multiply-adds: waking a second one costs more than a small job."""
    return 1 if work < 1 << 17 else torch.get_num_threads()


def _flat(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """An elementwise function, each element by the same vector code wherever it stands in `x`."""
    flat = x.reshape(-1)
    tail = -flat.numel() % ROWS
    if tail:
        flat = F.pad(flat, (0, tail))
    parts = [function(part) for part in torch.split(flat, _SERIAL)]
    joined = parts[0] if len(parts) == 1 else torch.cat(parts)
    return joined[: x.numel()].view(x.shape)


def silu_mul(x: Tensor) -> Tensor:
    """See `reference.silu_mul`."""
    if native.LIB is not None and x.dtype in CPP_DTYPES and x.dim() == 2 and x.stride(1) == 1:
        out = x.new_empty(len(x), x.shape[1] // 2)
        native.LIB.silu_mul(
            out.data_ptr(), x.data_ptr(), x.stride(0), native.DTYPE_CODES[x.dtype],
            *out.shape, threads_for(4 * x.numel()),
        )  # fmt: skip
        return out
    gate, up = x.chunk(2, -1)
    return _flat(F.silu, gate.float()).to(x.dtype).mul_(up)


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> Tensor:
    """See `reference.rms_norm`. Square roots and quotients are exact in any code path."""
    like = x if residual is None else residual
    rows = x.dim() == like.dim() == 2 and x.stride(1) == like.stride(1) == weight.stride(0) == 1
    types = {x.dtype, weight.dtype, like.dtype}
    if native.LIB is not None and len(types) == 1 and x.dtype in CPP_DTYPES and rows:
        out = x.new_empty(x.shape)
        native.LIB.rms_norm(
            out.data_ptr(), x.data_ptr(), x.stride(0),
            None if residual is None else residual.data_ptr(), like.stride(0), weight.data_ptr(),
            native.DTYPE_CODES[x.dtype], *x.shape, eps, threads_for(x.numel()),
        )  # fmt: skip
        return out
    if residual is not None:
        residual.add_(x)
        x = residual
    h = x.float()
    variance = h.square().mean(-1, keepdim=True)
    return weight * (h / (variance + eps).sqrt()).to(x.dtype)


def rope_store_kv_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    kv_slots: Tensor,
    k_blocks: Tensor,
    v_blocks: Tensor,
) -> None:
    """See `reference.rope_store_kv_`: sums and products only, exact in any code path."""
    tokens, heads, dim = q.shape
    types = {q.dtype, k.dtype, v.dtype, k_blocks.dtype, v_blocks.dtype}
    same = q.stride(0) == k.stride(0) == v.stride(0) and k_blocks.stride() == v_blocks.stride()
    dense = all(t.stride()[-2:] == (dim, 1) for t in (q, k, v, k_blocks))
    tables = all(t.is_contiguous() for t in (cos, sin, positions, kv_slots))
    tables = tables and cos.dtype == sin.dtype == torch.float32
    tables = tables and positions.dtype == kv_slots.dtype == torch.int64
    if (
        native.LIB is not None
        and len(types) == 1
        and q.dtype in CPP_DTYPES
        and same
        and dense
        and tables
    ):
        native.LIB.rope_store_kv(
            q.data_ptr(), k.data_ptr(), v.data_ptr(), q.stride(0), native.DTYPE_CODES[q.dtype],
            cos.data_ptr(), sin.data_ptr(), positions.data_ptr(), kv_slots.data_ptr(),
            k_blocks.data_ptr(), v_blocks.data_ptr(), k_blocks.stride(0), k_blocks.stride(1),
            tokens, heads, k.shape[1], dim, k_blocks.shape[1], threads_for(q.numel()),
        )  # fmt: skip
        return
    reference.rope_store_kv_(q, k, v, cos, sin, positions, kv_slots, k_blocks, v_blocks)


def paged_attention(
    q: Tensor,
    k_blocks: Tensor,
    v_blocks: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_starts: Tensor,
    scale: float,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> Tensor:
    """See `reference.paged_attention`: sequences with as many query rows are computed together."""
    out = torch.zeros(q.shape, dtype=q.dtype)
    where = (block_table, seq_lens, query_starts)
    if _cpp_attention(out, q, k_blocks, v_blocks, where, scale, k_scale):
        return out
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
            found = _attend(
                q[rows],
                k_blocks,
                v_blocks,
                block_table[index],
                seq_lens[index],
                scale,
                k_scale,
                v_scale,
            )
            out[rows] = found
    return out


def _cpp_attention(
    out: Tensor,
    q: Tensor,
    k_blocks: Tensor,
    v_blocks: Tensor,
    where: tuple[Tensor, Tensor, Tensor],  # block_table, seq_lens, query_starts
    scale: float,
    k_scale: Tensor | None,
) -> bool:
    """Does it in C++ if the library can; whether it did."""
    same = q.dtype == k_blocks.dtype == v_blocks.dtype and k_blocks.stride() == v_blocks.stride()
    dense = q.stride()[1:] == (q.shape[2], 1) and k_blocks.stride()[2:] == (q.shape[2], 1)
    fits = same and dense and k_scale is None and all(t.dtype == torch.int32 for t in where)
    if native.LIB is None or q.dtype not in CPP_DTYPES or not fits:
        return False
    table, lens, starts = (t.contiguous() for t in where)
    native.LIB.paged_attention(
        out.data_ptr(), q.data_ptr(), q.stride(0), native.DTYPE_CODES[q.dtype],
        k_blocks.data_ptr(), v_blocks.data_ptr(), k_blocks.stride(0), k_blocks.stride(1),
        table.data_ptr(), table.shape[1], lens.data_ptr(), starts.data_ptr(),
        len(lens), q.shape[1], k_blocks.shape[2], q.shape[2], k_blocks.shape[1],
        scale, threads_for(q.numel() * table.shape[1] * k_blocks.shape[1]),
    )  # fmt: skip
    return True


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
    """Online softmax over KV tiles at fixed positions, query rows padded to 16."""
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
    top = torch.full(shape, -1e30)
    total = torch.zeros(shape)
    acc = torch.zeros(*shape[:3], dim)
    longest = int(seq_lens.max())
    for start in range(0, longest, KV_TILE):
        positions = torch.arange(start, start + KV_TILE)
        block = (positions // block_size).clamp_(max=block_table.shape[1] - 1)
        blocks = block_table[:, block].long().clamp_(min=0)  # [seqs, tile]
        live = positions < seq_lens[:, None]
        k = _tile(k_blocks, blocks, positions % block_size, live, k_scale)
        v = _tile(v_blocks, blocks, positions % block_size, live, v_scale)
        scores = torch.bmm(x, k.transpose(1, 2)).view(*shape[:3], KV_TILE)
        scores = scores.masked_fill_(positions > last, float("-inf"))
        higher = torch.maximum(top, scores.amax(-1, keepdim=True))
        keep = _flat(torch.exp, top - higher)
        weights = _flat(torch.exp, scores - higher)
        total = total * keep + weights.sum(-1, keepdim=True)
        acc = acc * keep + torch.bmm(weights.flatten(0, 1), v).view_as(acc)
        top = higher
    found = (acc / total)[:, :, :rows].reshape(seqs, kv_heads, queries, group, dim)
    return found.permute(0, 2, 1, 3, 4).reshape(seqs, queries, heads, dim).to(q.dtype)


def _tile(
    pages: Tensor, blocks: Tensor, offsets: Tensor, live: Tensor, scale: Tensor | None
) -> Tensor:
    """One KV tile as fp32 [seqs * kv_heads, tile, head_dim], zero where a sequence has ended."""
    tile = pages[blocks, offsets].float()  # [seqs, tile, kv_heads, head_dim]
    if scale is not None:
        tile = tile * scale[:, None]
    tile = torch.where(live[..., None, None], tile, 0.0)
    return tile.transpose(1, 2).flatten(0, 1)


def apply_token_mask_(logits: Tensor, mask: Tensor) -> None:
    """See `reference.apply_token_mask_`."""
    code = native.DTYPE_CODES.get(logits.dtype)
    if native.LIB is None or code is None or logits.stride(-1) != 1 or mask.stride(-1) != 1:
        return reference.apply_token_mask_(logits, mask)
    native.LIB.apply_token_mask(
        logits.data_ptr(), logits.stride(0), code, mask.data_ptr(), mask.stride(0),
        *logits.shape, torch.get_num_threads(),
    )  # fmt: skip


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """See `reference.linear`. The caller pads rows to a multiple of 16."""
    y = _gemm(x, weight)
    return y if bias is None else y.add_(bias)


# What `_rows_stay_apart` said of (dtype, rows, in, out, threads): a fact of the machine.
_APART: dict[tuple[torch.dtype, int, int, int, int], bool] = {}


def _gemm(x: Tensor, weight: Tensor) -> Tensor:
    """x [rows, in] @ weight.T [in, out]: each row's bits are those it has in a block of 16 rows."""
    if len(x) <= ROWS:
        return F.linear(x, weight)
    shape = (x.dtype, len(x), weight.shape[1], len(weight), torch.get_num_threads())
    if shape not in _APART:
        _APART[shape] = _rows_stay_apart(len(x), weight)
        if not _APART[shape]:
            logger.warning("torch's GEMM %s mixes rows on this CPU: it runs 16 at a time", shape)
    return F.linear(x, weight) if _APART[shape] else _by_blocks(x, weight)


def _rows_stay_apart(rows: int, weight: Tensor) -> bool:
    """Whether torch's GEMM of this shape gives what blocks of 16 rows give; tried on noise."""
    noise = torch.randn(rows, weight.shape[1], generator=torch.Generator().manual_seed(rows))
    noise = noise.to(weight.dtype)
    return torch.equal(F.linear(noise, weight), _by_blocks(noise, weight))


def _by_blocks(x: Tensor, weight: Tensor) -> Tensor:
    return torch.cat([F.linear(block, weight) for block in torch.split(x, ROWS)])
