"""Arguments of `rope_store_kv_`."""

from __future__ import annotations

import torch
from torch import Tensor

STORED = [3, 0, 23, 8]
"""The KV slots that are written; two tokens of six store nothing."""


def make_rope_call(
    dtype: torch.dtype,
    *,
    kv_dtype: torch.dtype | None = None,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 10,
) -> list[Tensor]:
    """Six tokens of a fused projection, 20 positions, three blocks of eight tokens."""
    qkv = torch.randn(6, heads + 2 * kv_heads, head_dim).to(dtype)
    q, k, v = qkv.split((heads, kv_heads, kv_heads), 1)
    angles = torch.randn(20, head_dim // 2)
    positions, kv_slots = torch.randint(20, (6,)), torch.tensor([3, -1, 0, 23, -1, 8])
    k_blocks, v_blocks = torch.randn(2, 3, 8, kv_heads, head_dim).to(kv_dtype or dtype)
    return [q, k, v, angles.cos(), angles.sin(), positions, kv_slots, k_blocks, v_blocks]
