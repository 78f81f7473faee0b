"""The public ops: schemas, checked wrappers, what each device does. The dispatcher is torch's."""

from __future__ import annotations

from collections.abc import Sequence
from operator import le
from typing import Any

import torch
from torch import Tensor

from . import cpu, cpu_attention, cpu_lora, cuda, packed
from .library import define, implement
from .packed import PackedWeight
from .tiles import Table, Tiles

_TABLE = (
    "Tensor page_ids, Tensor page_weights, Tensor num_pages, "
    "Tensor? scale_row, Tensor? scale, Tensor? bias"
)
_TILES = "Tensor tile_slots, Tensor tile_starts, Tensor tile_lens, Tensor num_tiles"
_SHRINK = define(
    f"lora_shrink(Tensor x, Tensor a_pages, {_TABLE}, {_TILES}, int split_k) -> Tensor"
)
_SPLITS = define("lora_splits(Tensor x, Tensor a_pages) -> int")
_EXPAND = define(
    f"lora_expand_(Tensor(a!) y, Tensor planes, Tensor b_pages, {_TABLE}, {_TILES}, "
    "int[] slice_starts) -> ()"
)
_LORA = define(
    f"lora_(Tensor(a!) y, Tensor x, Tensor a_pages, Tensor b_pages, {_TABLE}, {_TILES}, "
    "int[] slice_starts) -> ()"
)
_EMBED = define(
    f"lora_embed_(Tensor(a!) y, Tensor ids, Tensor a_pages, Tensor b_pages, {_TABLE}, {_TILES}) "
    "-> ()"
)
_ATTENTION = define(
    "paged_attention(Tensor q, Tensor k_blocks, Tensor v_blocks, Tensor block_table, "
    "Tensor seq_lens, Tensor query_starts, float scale, int max_query_len, int max_seq_len, "
    "Tensor? k_scale, Tensor? v_scale, bool batch_invariant=False) -> Tensor"
)
_ROPE = define(
    "rope_store_kv_(Tensor(a!) q, Tensor k, Tensor v, Tensor cos, Tensor sin, "
    "Tensor positions, Tensor kv_slots, Tensor(b!) k_blocks, Tensor(c!) v_blocks, "
    "Tensor? k_scale=None, Tensor? v_scale=None) -> ()"
)
_NORM = define("rms_norm(Tensor x, Tensor weight, float eps, Tensor(a!)? residual) -> Tensor")
_SILU = define("silu_mul(Tensor x) -> Tensor")
_MASK = define("apply_token_mask_(Tensor(a!) logits, Tensor mask) -> ()")
_TOP = define("top_logprobs(Tensor logits, Tensor targets, int top) -> (Tensor, Tensor, Tensor)")
_DRAW = define(
    "draw(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor log_min_p, "
    "Tensor numbers) -> (Tensor, Tensor)"
)
_LINEAR = define(
    "linear(Tensor x, Tensor weight, Tensor? bias, bool batch_invariant=False) -> Tensor"
)
_PACKED = define(
    "linear_packed(Tensor x, Tensor data, Tensor? scales, str kind, int out, int in_, int group, "
    "Tensor? bias) -> Tensor"
)


def lora_shrink(x: Tensor, a_pages: Tensor, table: Table, tiles: Tiles, split_k: int = 1) -> Tensor:
    """The first stage of `lora_`, into rank space: fp32 [split_k, tokens, slices * max_pages * 8].

    x [tokens, in]; a_pages [pages, slices, 8, in]. Entries beyond a row's own pages are undefined.
    """
    _check(
        x.dim() == 2 and a_pages.dim() == 4,
        "x must be [tokens, in], a_pages [pages, slices, 8, in]",
    )
    _check(
        x.shape[1] == a_pages.shape[3], f"x has {x.shape[1]} columns, a_pages {a_pages.shape[3]}"
    )
    _check(1 <= split_k <= max(x.shape[1], 1), f"split_k {split_k} is not within 1..{x.shape[1]}")
    planes: Tensor = _SHRINK(x, a_pages, *table, *tiles, split_k)
    return planes


def lora_splits(x: Tensor, a_pages: Tensor) -> int:
    """The `split_k` with which `lora_` computes: with it, the two stages give the same bits."""
    found: int = _SPLITS(x, a_pages)
    return found


def lora_expand_(
    y: Tensor,
    planes: Tensor,
    b_pages: Tensor,
    table: Table,
    tiles: Tiles,
    slice_starts: Sequence[int],
) -> None:
    """The second stage of `lora_`: sums the planes in order, adds B times them, rounds once."""
    _check_out(y, b_pages, slice_starts)
    _EXPAND(y, planes, b_pages, *table, *tiles, list(slice_starts))


def lora_(
    y: Tensor,  # [tokens, out], changed in place
    x: Tensor,  # [tokens, in]
    a_pages: Tensor,  # [pages, slices, 8, in]
    b_pages: Tensor,  # [pages, 8, out]
    table: Table,
    tiles: Tiles,
    slice_starts: Sequence[int],
) -> None:
    """Adds to each row of `y` the low-rank delta of that row's slot; base rows stay untouched.

    `y[t] = round(c * y[t] + sum_p B[p]^T (w_p * A[p] x[t]) + bias)` over the pages p of t's slot,
    in table order, in fp32. Pages may have any stride(0). Raises ValueError for shapes that
    disagree; on CPU IndexError, with y as it was, for a table or tiles that name what is not there
    and for tiles that overlap or go back.
    """
    _check_out(y, b_pages, slice_starts)
    _check(x.dim() == 2 and len(x) == len(y), "x and y must have as many rows")
    _check(a_pages.shape[2:3] == (8,), "a_pages must be [pages, slices, 8, in]")
    _check(
        x.shape[1] == a_pages.shape[3], f"x has {x.shape[1]} columns, a_pages {a_pages.shape[3]}"
    )
    _check(
        a_pages.shape[1] == len(slice_starts) - 1, "a_pages and slice_starts disagree on the slices"
    )
    _LORA(y, x, a_pages, b_pages, *table, *tiles, list(slice_starts))


def lora_embed_(
    y: Tensor, ids: Tensor, a_pages: Tensor, b_pages: Tensor, table: Table, tiles: Tiles
) -> None:
    """`lora_` for an embedding: ids int64 [tokens] choose rows of a_pages [pages, vocab, 8].

    Of `ids` those are looked at, and on CPU checked, that stand in a tile.
    """
    _check_out(y, b_pages, (0, y.shape[1]))
    _check(a_pages.dim() == 3 and a_pages.shape[2] == 8, "a_pages must be [pages, vocab, 8]")
    _check(ids.shape == y.shape[:1], "ids and y must have as many rows")
    _EMBED(y, ids, a_pages, b_pages, *table, *tiles)


def lora_head_(
    y: Tensor, x: Tensor, a_pages: Tensor, b_pages: Tensor, table: Table, tiles: Tiles
) -> None:
    """`lora_` on logits y [rows, vocab] of hidden x [rows, hidden], with tiles over those rows."""
    lora_(y, x, a_pages, b_pages, table, tiles, (0, y.shape[1]))


def paged_attention(
    q: Tensor,  # [tokens, heads, head_dim]
    k_blocks: Tensor,  # [blocks, block_size, kv_heads, head_dim]
    v_blocks: Tensor,
    block_table: Tensor,  # int32 [seqs, max_blocks]
    seq_lens: Tensor,  # int32 [seqs], this step's tokens included
    query_starts: Tensor,  # int32 [seqs + 1]
    *,
    scale: float,
    max_query_len: int,
    max_seq_len: int,
    k_scale: Tensor | None = None,  # fp32 [kv_heads]
    v_scale: Tensor | None = None,
    batch_invariant: bool = False,
    out: Tensor | None = None,
) -> Tensor:  # [tokens, heads, head_dim]
    """Causal attention over KV pages, one op for prompt chunks and single tokens.

    A sequence's query rows are the last of its `seq_lens` tokens. Rows of no sequence become 0.
    With `batch_invariant` a token has the same bits alone and in any chunk; on CPU it always has.
    On CPU IndexError, with `out` as it was, for query rows, lengths or blocks that are not there.
    """
    _check(
        q.dim() == 3 and k_blocks.dim() == 4, "q must be [tokens, heads, dim], pages 4-dimensional"
    )
    _check(k_blocks.shape == v_blocks.shape, "k_blocks and v_blocks must have one shape")
    _check(q.shape[1] % k_blocks.shape[2] == 0, "query heads must be a multiple of KV heads")
    found: Tensor = _ATTENTION(
        q, k_blocks, v_blocks, block_table, seq_lens, query_starts, scale,
        max_query_len, max_seq_len, k_scale, v_scale, batch_invariant,
    )  # fmt: skip
    return found if out is None else out.copy_(found)


def rope_store_kv_(
    q: Tensor,  # [tokens, heads, head_dim], rotated in place
    k: Tensor,  # [tokens, kv_heads, head_dim]
    v: Tensor,
    cos: Tensor,  # fp32 [positions, head_dim / 2]
    sin: Tensor,
    positions: Tensor,  # int64 [tokens]
    kv_slots: Tensor,  # int64 [tokens], block * block_size + offset, -1 = do not store
    k_blocks: Tensor,  # [blocks, block_size, kv_heads, head_dim], written in place
    v_blocks: Tensor,
    k_scale: Tensor | None = None,  # fp32 [kv_heads], for e4m3 pages, on CPU for int8 ones too
    v_scale: Tensor | None = None,
) -> None:
    """Rotates q and k by position (half against half) and stores k and v in their pages.

    With scales, k and v are divided by their head's and cut to the pages' finite range. On CPU
    IndexError, with all as it was, for positions and slots that are not there. Nobody checks that
    no two tokens have one slot: it would then hold a mixture of them.
    """
    _check(cos.shape[1] * 2 == q.shape[2], "cos and sin must have head_dim / 2 columns")
    _check((k_scale is None) == (v_scale is None), "k_scale and v_scale come together")
    _check(len(positions) == len(kv_slots) == len(q), "positions and kv_slots must be [tokens]")
    _ROPE(q, k, v, cos, sin, positions, kv_slots, k_blocks, v_blocks, k_scale, v_scale)


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
    """RMS norm of x [tokens, hidden]; with `residual`, of `residual += x`, done in place."""
    _check(x.shape[-1:] == weight.shape, "weight must have as many elements as x has columns")
    y: Tensor = _NORM(x, weight, eps, residual)
    return y


def silu_mul(x: Tensor) -> Tensor:
    """`silu(gate) * up` of x = [gate | up], [tokens, 2 * inter] -> [tokens, inter]."""
    _check(x.shape[-1] % 2 == 0, "x must have an even number of columns")
    y: Tensor = _SILU(x)
    return y


def apply_token_mask_(logits: Tensor, mask: Tensor) -> None:
    """Sets logits [rows, vocab] to -inf where mask, int32 [rows, ceil(vocab / 32)], has bit 0."""
    _check(mask.dtype == torch.int32, "mask must be int32")
    _check(
        mask.shape == (len(logits), -(-logits.shape[1] // 32)),
        "mask must be [rows, ceil(vocab / 32)]",
    )
    _MASK(logits, mask)


def top_logprobs(
    logits: Tensor,  # [rows, vocab]
    targets: Tensor,  # int64 [rows]
    top: int,
) -> tuple[Tensor, Tensor, Tensor]:  # int64 ids, fp32 logprobs, int64 ranks, each [rows, 1 + top]
    """Of each row the target and the `top` likeliest tokens, with log probabilities and ranks.

    A rank is 1 + the number of larger logits; of equal ones the lowest ids come first. `top` is cut
    to the vocabulary. A row's bits are its own. On CPU IndexError for a target outside of it.
    """
    _check(logits.dim() == 2 and len(targets) == len(logits), "targets must be [rows]")
    _check(top >= 0, f"top must not be negative, but is {top}")
    found: tuple[Tensor, Tensor, Tensor] = _TOP(logits, targets, min(top, logits.shape[1]))
    return found


def draw(
    logits: Tensor,  # [rows, vocab]
    temperature: Tensor,  # fp32 [rows], above 0
    top_k: Tensor,  # int64 [rows], at least 1; from vocab on it keeps all
    top_p: Tensor,  # fp64 [rows], above 0; 1 keeps all
    log_min_p: Tensor,  # fp64 [rows], at most 0; -inf keeps all
    numbers: Tensor,  # int64 [rows] in [0, 2**53), uniform: which token it is
) -> tuple[Tensor, Tensor]:  # int64 [rows] tokens, bool [rows] failed
    """A random token for each row: the inverse of its cumulative probability, likeliest first.

    A row with NaN or +inf, or without anything finite, fails and has token 0. A row's token is its
    own.
    """
    each = (temperature, top_k, top_p, log_min_p, numbers)
    _check(logits.dim() == 2 and logits.shape[1] > 0, "logits must be [rows, vocab]")
    _check(
        all(t.shape == logits.shape[:1] for t in each),
        "temperature, top_k, top_p, log_min_p and numbers must be [rows]",
    )
    found: tuple[Tensor, Tensor] = _DRAW(logits, *each)
    return found


def linear(
    x: Tensor,
    weight: Tensor | PackedWeight,
    bias: Tensor | None = None,
    batch_invariant: bool = False,
) -> Tensor:
    """`x @ weight.T + bias` of x [tokens, in] and a weight [out, in], packed or not.

    With `batch_invariant` a row's bits do not depend on the number of rows; on CPU they never do.
    """
    is_packed = isinstance(weight, PackedWeight)
    columns = weight.in_ if isinstance(weight, PackedWeight) else weight.shape[1]
    _check(x.shape[-1] == columns, f"x has {x.shape[-1]} columns, weight {columns}")
    y: Tensor = (
        _PACKED(x, *weight, bias) if is_packed else _LINEAR(x, weight, bias, batch_invariant)
    )
    return y


def _check(condition: bool, text: str) -> None:
    if not condition:
        raise ValueError(text)


def _check_out(y: Tensor, b_pages: Tensor, slice_starts: Sequence[int]) -> None:
    _check(y.dim() == 2 and b_pages.dim() == 3, "y must be [tokens, out], b_pages [pages, 8, out]")
    _check(
        y.shape[1] == b_pages.shape[2], f"y has {y.shape[1]} columns, b_pages {b_pages.shape[2]}"
    )
    _check(b_pages.shape[1] == 8, "b_pages must be [pages, 8, out]")
    _check(
        slice_starts[0] == 0 and slice_starts[-1] == y.shape[1],
        "slice_starts must span y's columns",
    )
    _check(all(map(le, slice_starts, slice_starts[1:])), "slice_starts must not fall")


# What torch.ops call: the NamedTuples arrive as their tensors, 6 of a table and 4 of tiles.

implement(
    "lora_shrink",
    "CPU",
    lambda x, a, *r: cpu_lora.lora_shrink(x, a, Table(*r[:6]), Tiles(*r[6:10]), r[10]),
)
implement("lora_splits", "CPU", lambda _x, _a: 1)
implement(
    "lora_expand_",
    "CPU",
    lambda y, planes, b, *r: cpu_lora.lora_expand_(
        y, planes, b, Table(*r[:6]), Tiles(*r[6:10]), r[10]
    ),
)
implement(
    "lora_",
    "CPU",
    lambda y, x, a, b, *r: cpu_lora.lora_(y, x, a, b, Table(*r[:6]), Tiles(*r[6:10]), r[10]),
)
implement(
    "lora_embed_",
    "CPU",
    lambda y, ids, a, b, *r: cpu_lora.lora_embed_(y, ids, a, b, Table(*r[:6]), Tiles(*r[6:10])),
)
implement(
    "paged_attention",
    "CPU",
    # Without the grid's bounds and batch_invariant, which on CPU always holds.
    lambda *a: cpu_attention.paged_attention(*a[:7], *a[9:11]),
)
implement("linear_packed", "CPU", lambda x, *r: packed.linear(x, PackedWeight(*r[:6]), r[6]))
implement("linear", "CPU", lambda x, weight, bias, *_: cpu.linear(x, weight, bias))
for _name in (
    "rope_store_kv_",
    "rms_norm",
    "silu_mul",
    "apply_token_mask_",
    "top_logprobs",
    "draw",
):
    implement(_name, "CPU", getattr(cpu, _name))


def _meta_shrink(x: Tensor, a_pages: Tensor, page_ids: Tensor, *rest: Any) -> Tensor:
    columns = a_pages.shape[1] * page_ids.shape[1] * 8
    return x.new_empty((rest[-1], len(x), columns), dtype=torch.float32)


implement("lora_shrink", "Meta", _meta_shrink)
implement("lora_splits", "Meta", lambda _x, _a: 1)
implement("paged_attention", "Meta", lambda q, *_: torch.empty_like(q))


def _meta_top(logits: Tensor, _: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
    ids = logits.new_empty((len(logits), 1 + top), dtype=torch.int64)
    return ids, torch.empty_like(ids, dtype=torch.float32), torch.empty_like(ids)


implement("top_logprobs", "Meta", _meta_top)
implement(
    "draw",
    "Meta",
    lambda logits, *_: tuple(
        logits.new_empty(len(logits), dtype=dtype) for dtype in (torch.int64, torch.bool)
    ),
)
implement("rms_norm", "Meta", lambda x, *_: torch.empty_like(x))
implement("silu_mul", "Meta", lambda x: x.new_empty((*x.shape[:-1], x.shape[-1] // 2)))
implement("linear", "Meta", lambda x, weight, *_: x.new_empty((*x.shape[:-1], len(weight))))
implement(
    "linear_packed", "Meta", lambda x, _data, _scales, _kind, out, *_: x.new_empty((len(x), out))
)
for _name in ("lora_expand_", "lora_", "lora_embed_", "rope_store_kv_", "apply_token_mask_"):
    implement(_name, "Meta", lambda *_: None)

cuda.register()
