"""What works on each token by itself: norms, activations, rotary positions and the KV store."""

from __future__ import annotations

from torch import Tensor

from ..cpu import elementwise as cpu
from ..cuda import dispatch as cuda
from ..library import register
from .arguments import check, refuse_gradients


def rms_norm(
    x: Tensor,  # [tokens, hidden]
    weight: Tensor,  # [hidden]
    eps: float,
    residual: Tensor | None = None,  # [tokens, hidden], changed in place
    change: Tensor | None = None,  # fp32 [rows, hidden]
    change_row: Tensor | None = None,  # int32 [tokens], -1 = none
) -> Tensor:  # [tokens, hidden], of x's dtype
    """`weight * x / sqrt(mean(x^2) + eps)`; with `residual`, of `residual += x`, in x's place.

    With `change`, the weight of a token is `weight + change[change_row]`, or `weight` where that is
    -1. The mean runs in fp32; the normalised value is rounded before the product. ValueError for
    shapes that disagree; on CPU IndexError, with all as it was, for a row out of range.
    """
    refuse_gradients(x, weight, residual, change)
    check(x.shape[-1:] == weight.shape, "weight must have as many elements as x has columns")
    check(residual is None or residual.shape == x.shape, "residual must be like x")
    check((change is None) == (change_row is None), "change and change_row come together")
    if change is not None and change_row is not None:
        check(x.dim() == 2 and change.shape[1:] == weight.shape, "change must be [rows, hidden]")
        check(change_row.shape == x.shape[:1], "change_row and x must have as many rows")
    own = change, change_row
    # Two ops: torch.compile cannot lower one that changes an argument which may be None.
    if residual is None:
        y: Tensor = _NORM(x, weight, eps, *own)
    else:
        y = _ADD_NORM(residual, x, weight, eps, *own)
    return y


def silu_mul(x: Tensor) -> Tensor:
    """`silu(gate) * up` of x = [gate | up], [tokens, 2 * inter] -> [tokens, inter], in x's dtype.

    ValueError for an odd number of columns.
    """
    refuse_gradients(x)
    check(x.shape[-1] % 2 == 0, "x must have an even number of columns")
    y: Tensor = _SILU(x)
    return y


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
    k_scale: Tensor | None = None,  # fp32 [kv_heads], for e4m3 blocks, on CPU for int8 ones too
    v_scale: Tensor | None = None,
) -> None:
    """Rotates q and k by position (half against half) and stores k and v in their blocks.

    With scales, k and v are divided by their head's and cut to the blocks' finite range; in int8
    blocks what is not finite is marked, and reads as NaN (`reference.LOST`). ValueError for shapes
    that disagree and for one scale without the other. On CPU IndexError, with all as it was, for
    positions and slots out of range. Nobody checks that no two tokens have one slot: it would then
    hold a mixture of them.
    """
    refuse_gradients(q, k, v, cos, sin, k_blocks, v_blocks, k_scale, v_scale)
    check(cos.shape[1] * 2 == q.shape[2], "cos and sin must have head_dim / 2 columns")
    check((k_scale is None) == (v_scale is None), "k_scale and v_scale come together")
    check(len(positions) == len(kv_slots) == len(q), "positions and kv_slots must be [tokens]")
    _ROPE(q, k, v, cos, sin, positions, kv_slots, k_blocks, v_blocks, k_scale, v_scale)


def _normed(
    x: Tensor,
    weight: Tensor,
    eps: float,
    change: Tensor | None = None,
    change_row: Tensor | None = None,
) -> Tensor:
    return x.new_empty(x.shape)


def _added_and_normed(
    residual: Tensor,
    x: Tensor,
    weight: Tensor,
    eps: float,
    change: Tensor | None = None,
    change_row: Tensor | None = None,
) -> Tensor:
    return x.new_empty(x.shape)


def _half(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


_NORM = register(
    "rms_norm(Tensor x, Tensor weight, float eps, Tensor? change=None, Tensor? change_row=None) "
    "-> Tensor",
    cpu=cpu.rms_norm,
    cuda=cuda.rms_norm,
    meta=_normed,
)
_ADD_NORM = register(
    "add_rms_norm_(Tensor(a!) residual, Tensor x, Tensor weight, float eps, "
    "Tensor? change=None, Tensor? change_row=None) -> Tensor",
    cpu=cpu.add_rms_norm_,
    cuda=cuda.add_rms_norm_,
    meta=_added_and_normed,
)
_SILU = register("silu_mul(Tensor x) -> Tensor", cpu=cpu.silu_mul, cuda=cuda.silu_mul, meta=_half)
_ROPE = register(
    "rope_store_kv_(Tensor(a!) q, Tensor k, Tensor v, Tensor cos, Tensor sin, "
    "Tensor positions, Tensor kv_slots, Tensor(b!) k_blocks, Tensor(c!) v_blocks, "
    "Tensor? k_scale=None, Tensor? v_scale=None) -> ()",
    cpu=cpu.rope_store_kv_,
    cuda=cuda.rope_store_kv_,
)
