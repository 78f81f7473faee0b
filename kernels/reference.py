"""What every op means, in plain torch: slow on purpose, right by reading.

Sums run in float32, or in float64 when the inputs are float64. Nothing here is fast and nothing
else in the package is the definition.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from .tiles import PAGE_ROWS, Columns, Table, Tiles


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _tiles(tiles: Tiles) -> Iterator[tuple[int, slice]]:
    for i in range(int(tiles.num_tiles)):
        start = int(tiles.starts[i])
        yield int(tiles.slots[i]), slice(start, start + int(tiles.lens[i]))


def lora_shrink(
    x: Tensor,  # [tokens, in]
    a_pages: Tensor,  # [pages, slices, 8, in]
    table: Table,
    tiles: Tiles,
    split_k: int = 1,
) -> Tensor:  # [split_k, tokens, slices * max_pages * 8], fp32
    """`planes.sum(0)[t, s, p] = A[page p of t's slot, s] @ x[t]`: one plane for each part of K.

    Beyond a row's pages, and for rows in no tile, they are 0 here; nobody may rely on that.
    """
    wide, max_pages, slices = _wide(x), table.page_ids.shape[1], a_pages.shape[1]
    planes = torch.zeros((split_k, len(x), slices, max_pages, PAGE_ROWS), dtype=wide)
    parts = torch.arange(x.shape[1]).tensor_split(split_k)
    for slot, rows in _tiles(tiles):
        for p in range(int(table.num_pages[slot])):
            a = a_pages[int(table.page_ids[slot, p])].to(wide)  # [slices, 8, in]
            for k, part in enumerate(parts):
                planes[k, rows, :, p] = torch.einsum(
                    "ti,sri->tsr", x[rows][:, part].to(wide), a[..., part]
                )
    return planes.flatten(2)


def lora_expand_(
    y: Tensor,  # [tokens, out], changed in place
    planes: Tensor,  # [split_k, tokens, slices * max_pages * 8]
    b_pages: Tensor,  # [pages, 8, out]
    table: Table,
    tiles: Tiles,
    slice_starts: Sequence[int],  # [slices + 1], first output column of each slice
) -> None:
    """`y[t] = round(scale * y[t] + sum_p B[p]^T (weight_p * u[t, p]) + bias)`, pages in order."""
    wide, max_pages = _wide(y), table.page_ids.shape[1]
    u = planes.sum(0).reshape(len(y), len(slice_starts) - 1, max_pages, PAGE_ROWS)
    for slot, rows in _tiles(tiles):
        total = y[rows].to(wide)
        row = -1 if table.scale_row is None else int(table.scale_row[slot])
        if row >= 0:
            assert table.scale is not None
            total = total * table.scale[row].to(wide)
        for p in range(int(table.num_pages[slot])):
            b = b_pages[int(table.page_ids[slot, p])].to(wide)  # [8, out]
            scaled = (u[rows, :, p] * table.page_weights[slot, p]).to(b_pages.dtype).to(wide)
            for s, (first, last) in enumerate(pairwise(slice_starts)):
                total[:, first:last] += scaled[:, s] @ b[:, first:last]
        if row >= 0 and table.bias is not None:
            total = total + table.bias[row].to(wide)
        y[rows] = total.to(y.dtype)


def lora_(
    y: Tensor,  # [tokens, out], changed in place
    x: Tensor,  # [tokens, in]
    a_pages: Tensor,  # [pages, slices, 8, in]
    b_pages: Tensor,  # [pages, 8, out]
    table: Table,
    tiles: Tiles,
    slice_starts: Sequence[int],
) -> None:
    """Adds to each row of `y` the low-rank delta of that row's slot; rows in no tile stay."""
    lora_expand_(y, lora_shrink(x, a_pages, table, tiles), b_pages, table, tiles, slice_starts)


def lora_embed_(
    y: Tensor,  # [tokens, hidden], changed in place
    ids: Tensor,  # int64 [tokens]
    a_pages: Tensor,  # [pages, vocab, 8]
    b_pages: Tensor,  # [pages, 8, hidden]
    table: Table,
    tiles: Tiles,
) -> None:
    """`lora_` for an embedding: A's column of the token stands for `A @ one_hot`."""
    wide, max_pages = _wide(y), table.page_ids.shape[1]
    planes = torch.full((1, len(y), max_pages, PAGE_ROWS), float("nan"), dtype=wide)
    for slot, rows in _tiles(tiles):
        for p in range(int(table.num_pages[slot])):
            planes[0, rows, p] = a_pages[int(table.page_ids[slot, p]), ids[rows]].to(wide)
    lora_expand_(y, planes.flatten(2), b_pages, table, tiles, (0, y.shape[1]))


def lora_columns_(
    y: Tensor,  # [tokens, out], changed in place
    x: Tensor,  # [tokens, in]
    changes: Columns,
    tiles: Tiles,
) -> None:
    """`y[t, column_ids[slot, c]] += weights[slot, c] @ x[t]` for the columns of t's slot."""
    wide = _wide(y)
    for slot, rows in _tiles(tiles):
        count = int(changes.num_columns[slot])
        columns = changes.column_ids[slot, :count].long()
        delta = x[rows].to(wide) @ changes.weights[slot, :count].to(wide).T
        y[rows, columns] = (y[rows, columns].to(wide) + delta).to(y.dtype)


def paged_attention(
    q: Tensor,  # [tokens, heads, head_dim]
    k_blocks: Tensor,  # [blocks, block_size, kv_heads, head_dim]
    v_blocks: Tensor,  # [blocks, block_size, kv_heads, head_dim]
    block_table: Tensor,  # int32 [seqs, max_blocks]
    seq_lens: Tensor,  # int32 [seqs], tokens in the cache, those of this step included
    query_starts: Tensor,  # int32 [seqs + 1], first query row of each sequence
    *,
    scale: float,
    k_scale: Tensor | None = None,  # fp32 [kv_heads], of quantised blocks
    v_scale: Tensor | None = None,
) -> Tensor:  # [tokens, heads, head_dim]
    """Causal attention of each sequence's last tokens over its pages; rows of no sequence are 0."""
    wide, out = _wide(q), torch.zeros_like(q)
    group = q.shape[1] // k_blocks.shape[2]
    for i, length in enumerate(seq_lens.tolist()):
        rows = slice(int(query_starts[i]), int(query_starts[i + 1]))
        count = rows.stop - rows.start
        if not count:
            continue
        blocks = block_table[i, : -(-length // k_blocks.shape[1])].long()
        k = read_keys(k_blocks[blocks].flatten(0, 1)[:length], wide)  # [length, kv_heads, head_dim]
        v = v_blocks[blocks].flatten(0, 1)[:length].to(wide)
        k = k if k_scale is None else k * k_scale[:, None].to(wide)
        v = v if v_scale is None else v * v_scale[:, None].to(wide)
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        scores = torch.einsum("qhd,khd->hqk", q[rows].to(wide), k) * scale
        positions = torch.arange(length - count, length)
        hidden = torch.arange(length)[None] > positions[:, None]
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        out[rows] = torch.einsum("hqk,khd->qhd", weights, v).to(q.dtype)
    return out


LOST = -128
"""The first code of an int8 key that stands for a key or a value, of a token and KV head, that is
not finite: no number is stored as it, and it reads as NaN."""


def read_keys(codes: Tensor, dtype: torch.dtype) -> Tensor:  # [..., head_dim]
    """The numbers of keys in pages, without their scale."""
    keys = codes.to(dtype)
    if codes.dtype == torch.int8:
        keys = keys.masked_fill(codes[..., :1] == LOST, float("nan"))
    return keys


def rope_store_kv_(
    q: Tensor,  # [tokens, heads, head_dim], rotated in place
    k: Tensor,  # [tokens, kv_heads, head_dim]
    v: Tensor,  # [tokens, kv_heads, head_dim]
    cos: Tensor,  # fp32 [positions, head_dim / 2]
    sin: Tensor,  # fp32 [positions, head_dim / 2]
    positions: Tensor,  # int64 [tokens]
    kv_slots: Tensor,  # int64 [tokens], block * block_size + offset; -1 = do not store
    k_blocks: Tensor,  # [blocks, block_size, kv_heads, head_dim], written in place
    v_blocks: Tensor,
    k_scale: Tensor | None = None,  # fp32 [kv_heads], of int8 or e4m3 blocks
    v_scale: Tensor | None = None,
) -> None:
    """Rotates `q` and `k` by position (half against half) and stores `k` and `v` in pages.

    With scales, what is stored is divided by its head's and cut to the pages' finite range (int8:
    rounded to the nearest even, -127 to 127; what is not finite is marked as LOST).
    """
    wide, half, size = _wide(q), q.shape[-1] // 2, k_blocks.shape[1]
    c, s = cos[positions, None].to(wide), sin[positions, None].to(wide)

    def rotate(x: Tensor) -> Tensor:
        first, second = x[..., :half].to(wide), x[..., half:].to(wide)
        return torch.cat((first * c - second * s, second * c + first * s), -1).to(x.dtype)

    def stored(x: Tensor, scale: Tensor | None) -> Tensor:
        if scale is None:
            return x.to(k_blocks.dtype)
        x = x.to(wide) / scale[:, None].to(wide)
        if k_blocks.dtype == torch.int8:
            return x.nan_to_num().round().clamp(-127, 127).to(torch.int8)
        largest = torch.finfo(k_blocks.dtype).max
        return x.clamp(-largest, largest).to(k_blocks.dtype)

    q.copy_(rotate(q))
    keep = kv_slots >= 0
    block, offset = kv_slots[keep] // size, kv_slots[keep] % size
    keys, values = rotate(k)[keep], v[keep]
    found = stored(keys, k_scale)
    if k_blocks.dtype == torch.int8:
        lost = ~(keys.isfinite().all(-1) & values.isfinite().all(-1))
        found[..., 0].masked_fill_(lost, LOST)
    k_blocks[block, offset] = found
    v_blocks[block, offset] = stored(values, v_scale)


def rms_norm(
    x: Tensor,  # [tokens, hidden]
    weight: Tensor,  # [hidden]
    eps: float,
    residual: Tensor | None = None,  # [tokens, hidden]; += x, and normalised in x's place
    change: Tensor | None = None,  # fp32 [rows, hidden]
    change_row: Tensor | None = None,  # int32 [tokens], -1 = none
) -> Tensor:  # [tokens, hidden]
    """`weight * x / sqrt(mean(x^2) + eps)`, the normalised value rounded to x's dtype first.

    The weight of a token with a row of `change` is `weight + change[row]`, in fp32.
    """
    wide = _wide(x)
    if residual is not None:
        residual.add_(x)
        x = residual
    h = x.to(wide)
    h = (h / (h.square().mean(-1, keepdim=True) + eps).sqrt()).to(x.dtype)
    if change is None or change_row is None:
        return weight * h
    own = weight.to(wide) + change[change_row.clamp(min=0).long()].to(wide)
    own = torch.where((change_row >= 0)[:, None], own, weight.to(wide))
    return (own * h.to(wide)).to(x.dtype)


def silu_mul(x: Tensor) -> Tensor:  # [tokens, 2 * inter] -> [tokens, inter]
    """`silu(gate) * up` of a fused `[gate | up]`, silu in float32, rounded before the product."""
    gate, up = x.chunk(2, -1)
    return F.silu(gate.to(_wide(x))).to(x.dtype) * up


def apply_token_mask_(
    logits: Tensor,  # [rows, vocab], changed in place
    mask: Tensor,  # int32 [rows, ceil(vocab / 32)], bit set = allowed
) -> None:
    """Sets the logits of forbidden tokens to -inf."""
    bits = (mask[..., None] >> torch.arange(32, dtype=torch.int32)) & 1
    logits.masked_fill_(bits.flatten(1)[:, : logits.shape[1]] == 0, float("-inf"))


def top_logprobs(
    logits: Tensor,  # [rows, vocab]
    targets: Tensor,  # int64 [rows]
    top: int,  # at most vocab
) -> tuple[Tensor, Tensor, Tensor]:  # int64 ids, fp32 logprobs, int64 ranks, each [rows, 1 + top]
    """Of each row the target, then the `top` likeliest tokens, of equal ones the lowest ids.

    A rank is 1 + the number of larger logits. NaN is likelier than all, and makes every log
    probability of its row NaN. Never looks at a value, so that a GPU need not wait; row by row,
    because `log_softmax` of many rows may round otherwise.
    """
    ids = torch.empty(len(logits), 1 + top, dtype=torch.int64, device=logits.device)
    ranks, logprobs = torch.empty_like(ids), torch.empty_like(ids, dtype=torch.float32)
    for i, row in enumerate(logits):
        x = row.to(torch.float32, copy=True)
        best = _sortable(x).topk(top).indices
        ids[i] = torch.cat((targets[i : i + 1], best))
        logprobs[i] = x.log_softmax(-1)[ids[i]]
        likeliest = x[best]
        ranks[i, 1:] = 1 + (likeliest[None] > likeliest[:, None]).sum(-1)
        ranks[i, :1] = 1 + (x > x[ids[i, :1]]).sum(-1, keepdim=True)
    return ids, logprobs, ranks


def _sortable(logits: Tensor) -> Tensor:
    """int64 [vocab] keys in the order of fp32 logits, the lower id first among equal ones."""
    bits = (logits + 0.0).view(torch.int32)  # -0 becomes 0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    return (ordered << 32) - torch.arange(len(logits), device=logits.device)


ONE = 2**52
"""Probability 1 as an integer: cumulative probabilities are exact in any order, on any device."""

DRAW_BITS = 53
_LOW = 27  # bits: products of halves of 53-bit numbers fit in 63


def draw(
    logits: Tensor,  # [rows, vocab]
    temperature: Tensor,  # fp32 [rows], above 0
    top_k: Tensor,  # int64 [rows], 1 ..; from vocab on it keeps all
    top_p: Tensor,  # fp64 [rows], above 0; 1 keeps all
    log_min_p: Tensor,  # fp64 [rows], at most 0; -inf keeps all
    numbers: Tensor,  # int64 [rows] in [0, 2**53)
) -> tuple[Tensor, Tensor]:  # int64 [rows] tokens, bool [rows] failed
    """A random token for each row: the first at which the sum of probabilities passes its number.

    Likeliest first, of equal ones the lowest ids. top_k keeps what equals the k-th. Never looks at
    a value, so that a GPU need not wait.
    """
    vocab = logits.shape[1]
    # NaN sorts first, as the largest; equal logits keep the order of their ids.
    values, ids = (logits.float() / temperature[:, None]).sort(stable=True, descending=True)
    failed = ~values[:, 0].isfinite()
    least = (values[:, 0].double() + log_min_p).float()
    kth = values.gather(1, top_k.clamp(1, vocab)[:, None] - 1)[:, 0]
    floor = torch.maximum(least, kth).clamp(min=torch.finfo(torch.float32).min)
    values = values.masked_fill(values < floor[:, None], -torch.inf)
    cumulative = (values.double().softmax(-1) * ONE).long().cumsum(-1)
    # A token stays while those before it have not yet reached top_p.
    limit = (top_p * cumulative[:, -1]).ceil().long()
    last = torch.searchsorted(cumulative, limit[:, None]).clamp(max=vocab - 1)
    threshold = scaled(cumulative.gather(1, last)[:, 0], numbers)
    place = torch.searchsorted(cumulative, threshold[:, None], right=True).clamp(max=vocab - 1)
    return ids.gather(1, place)[:, 0].masked_fill(failed, 0), failed


def scaled(total: Tensor, number: Tensor) -> Tensor:
    """`total * number >> 53` of int64 numbers below 2**53 each, exactly."""
    a1, a0 = total >> (_LOW - 1), total & (1 << (_LOW - 1)) - 1
    b1, b0 = number >> _LOW, number & (1 << _LOW) - 1
    # total * number = a1 b1 2**53 + (a1 b0 + 2 a0 b1) 2**26 + a0 b0
    rest = (a1 * b0 + 2 * a0 * b1 + (a0 * b0 >> (_LOW - 1))) >> (DRAW_BITS - _LOW + 1)
    return a1 * b1 + rest


def linear(
    x: Tensor,  # [tokens, in]
    weight: Tensor,  # [out, in]; a quantised one is dequantised first
    bias: Tensor | None = None,  # [out]
) -> Tensor:  # [tokens, out]
    """`x @ weight.T + bias`."""
    wide = _wide(x)
    y = x.to(wide) @ weight.to(wide).T
    return (y if bias is None else y + bias.to(wide)).to(x.dtype)


def dequantize(
    codes: Tensor,  # int8 [out, in]
    scales: Tensor,  # [out, ceil(in / group)]
    group: int,  # columns that share a scale
) -> Tensor:  # [out, in], of the scales' dtype
    """`weight = code * scale`; the last group may have fewer columns."""
    columns = codes.shape[1]
    return codes.to(scales.dtype) * scales.repeat_interleave(group, 1)[:, :columns]
