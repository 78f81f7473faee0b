"""The parts of a Llama beside its linears: norm, rotary, attention, MLP."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

import multilora_kernels as mk

from ..config.lora_sites import Site
from ..config.model import ModelConfig
from ..config.quantization import Scheme
from .forward_batch import ForwardBatch
from .kv_cache import KVCache
from .lora_linear import LoraLinear
from .rope import Rope


class RMSNorm(nn.Module):
    """RMS norm; with a residual it adds into it first and normalises the sum."""

    def __init__(self, size: int, eps: float, dtype: torch.dtype, index: int) -> None:
        """`index` is its place among the norms of the model, see `norm_paths`."""
        super().__init__()
        self.index = index
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype), requires_grad=False)
        self.eps = eps

    def forward(self, x: Tensor, residual: Tensor, batch: ForwardBatch) -> Tensor:
        """x and residual [tokens, hidden]; residual changes in place."""
        if batch.norms is None:
            return mk.rms_norm(x, self.weight, self.eps, residual)
        return mk.rms_norm(x, self.weight, self.eps, residual, *batch.norms.of(self.index))


class Attention(nn.Module):
    """Grouped-query attention over the paged cache."""

    def __init__(
        self,
        config: ModelConfig,
        sites: dict[str, Site],
        layer: int,
        dtype: torch.dtype,
        schemes: Mapping[str, Scheme],
    ) -> None:
        super().__init__()
        self.layer, self.config = layer, config
        self.qkv, self.o = (
            LoraLinear(sites[n], layer, dtype, bias=config.attention_bias, scheme=schemes.get(n))
            for n in ("qkv", "o")
        )
        self.scale = 1.0 / math.sqrt(config.head_dim)

    def forward(self, x: Tensor, batch: ForwardBatch, cache: KVCache, rope: Rope) -> Tensor:
        """x [tokens, hidden] -> [tokens, hidden]; stores this step's K and V."""
        dim = self.config.head_dim
        fused = self.qkv(x, batch).view(len(x), -1, dim)
        heads, kv_heads = self.config.num_heads, self.config.num_kv_heads
        q, k, v = fused.split((heads, kv_heads, kv_heads), 1)
        pages = cache.layer(self.layer)
        cos, sin = rope.tables(batch.max_seq_len)
        mk.rope_store_kv_(q, k, v, cos, sin, batch.positions, batch.kv_slots, *pages)
        out = mk.paged_attention(
            q,
            pages.k,
            pages.v,
            batch.block_table,
            batch.seq_lens,
            batch.query_starts,
            scale=self.scale,
            max_query_len=batch.max_query_len,
            max_seq_len=batch.max_seq_len,
            k_scale=pages.k_scale,
            v_scale=pages.v_scale,
            batch_invariant=batch.batch_invariant,
        )
        out_x: Tensor = self.o(out.view(len(x), -1), batch)
        return out_x


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(
        self,
        config: ModelConfig,
        sites: dict[str, Site],
        layer: int,
        dtype: torch.dtype,
        schemes: Mapping[str, Scheme],
    ) -> None:
        super().__init__()
        self.gate_up, self.down = (
            LoraLinear(sites[n], layer, dtype, bias=config.mlp_bias, scheme=schemes.get(n))
            for n in ("gate_up", "down")
        )

    def forward(self, x: Tensor, batch: ForwardBatch) -> Tensor:
        """x [tokens, hidden] -> [tokens, hidden]."""
        y: Tensor = self.down(mk.silu_mul(self.gate_up(x, batch)), batch)
        return y
