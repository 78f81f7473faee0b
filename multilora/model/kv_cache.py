"""The tensors that hold keys and values, in blocks. `block_pool` says which is whose."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from multilora_kernels import empty_huge

from ..config.model import ModelConfig

DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn, "fp8_e4m3": torch.float8_e4m3fn}
"""Of quantised blocks, by `EngineConfig.kv_cache_dtype`; "auto" is the model's dtype."""


class KVScales(NamedTuple):
    """What a stored number is multiplied by: fp32 [layers, kv_heads] each."""

    k: Tensor
    v: Tensor


class LayerPages(NamedTuple):
    """One layer's part of a cache, in the order of `paged_attention`'s and `rope_store_kv_`'s."""

    k: Tensor  # [blocks, block_size, kv_heads, head_dim]
    v: Tensor
    k_scale: Tensor | None  # fp32 [kv_heads], of quantised blocks
    v_scale: Tensor | None


class KVCache:
    """K and V blocks of all layers: [layers, blocks, block_size, kv_heads, head_dim] each.

    Memory is reserved, not touched: on CPU a block costs nothing until a token is written to it.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        scales: KVScales | None = None,  # on the device; of quantised blocks
    ) -> None:
        shape = (config.num_layers, num_blocks, block_size, config.num_kv_heads, config.head_dim)
        self.k = empty_huge(shape, dtype, device)
        self.v = empty_huge(shape, dtype, device)
        self.scales = scales

    @property
    def num_blocks(self) -> int:
        """Blocks of each layer."""
        return self.k.shape[1]

    def layer(self, index: int) -> LayerPages:
        """The blocks and scales of one layer."""
        scales = (None, None) if self.scales is None else (s[index] for s in self.scales)
        return LayerPages(self.k[index], self.v[index], *scales)

    @staticmethod
    def block_bytes(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
        """Bytes of one block over all layers, K and V."""
        per_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim
        return per_token * block_size * dtype.itemsize
