"""The tensors that hold keys and values, in pages. `blocks.py` says which page is whose."""

from __future__ import annotations

import torch
from torch import Tensor

from multilora_kernels import huge_pages

from .config import ModelConfig


class KVCache:
    """K and V pages of all layers: [layers, blocks, block_size, kv_heads, head_dim] each.

    Memory is reserved, not touched: on CPU a block costs nothing until a token is written to it.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (config.num_layers, num_blocks, block_size, config.num_kv_heads, config.head_dim)
        self.k = huge_pages(torch.empty(shape, dtype=dtype, device=device))
        self.v = huge_pages(torch.empty(shape, dtype=dtype, device=device))

    @property
    def num_blocks(self) -> int:
        """Pages of each layer."""
        return self.k.shape[1]

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """K and V pages of one layer, each [blocks, block_size, kv_heads, head_dim]."""
        return self.k[index], self.v[index]

    @staticmethod
    def block_bytes(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
        """Bytes of one block over all layers, K and V."""
        per_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim
        return per_token * block_size * dtype.itemsize
