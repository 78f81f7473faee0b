"""Llama 2, 3, 3.1, 3.2 and 3.3, whole."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..batch import ForwardBatch
from ..config import ModelConfig
from ..kv_cache import KVCache
from ..layers import MLP, Attention, Linear, RMSNorm, Rope
from ..sites import Site, sites_of


class Block(nn.Module):
    """One decoder layer."""

    def __init__(
        self, config: ModelConfig, sites: dict[str, Site], layer: int, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.attention = Attention(config, sites, layer, dtype)
        self.mlp = MLP(config, sites, layer, dtype)
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)

    def forward(
        self, x: Tensor, residual: Tensor, batch: ForwardBatch, cache: KVCache, rope: Rope
    ) -> Tensor:
        """x is what the last part adds; the running sum is `residual`, changed in place."""
        x = self.attention(self.attention_norm(x, residual), batch, cache, rope)
        y: Tensor = self.mlp(self.mlp_norm(x, residual), batch)
        return y


class Llama(nn.Module):
    """A Llama for causal language modelling, with LoRA per row of the batch."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        sites = sites_of(config)
        self.config = config
        self.embed = nn.Parameter(
            torch.empty(config.vocab_size, config.hidden_size, dtype=dtype), requires_grad=False
        )
        self.blocks = nn.ModuleList(
            Block(config, sites, i, dtype) for i in range(config.num_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.head = Linear(sites["lm_head"], 0, dtype)
        if config.tie_word_embeddings:
            self.head.weight = self.embed
        self.rope = Rope(config)

    def forward(self, batch: ForwardBatch, cache: KVCache) -> Tensor:
        """Logits [logits_rows, vocab] of the tokens that `batch.logits_rows` names."""
        x = self.embed[batch.ids]
        batch.add_embed_lora_(x)
        residual = torch.zeros_like(x)
        for block in self.blocks:
            x = block(x, residual, batch, cache, self.rope)
        x = self.norm(x, residual)[batch.logits_rows]
        logits: Tensor = self.head(x, batch)
        return logits

    def targets(self) -> dict[str, Tensor]:
        """Checkpoint name (Hugging Face's) -> the tensor that it fills."""
        found: dict[str, Tensor] = {"model.embed_tokens.weight": self.embed}
        found["model.norm.weight"] = self.norm.weight
        if not self.config.tie_word_embeddings:
            found |= self.head.targets()
        for i, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            found[f"model.layers.{i}.input_layernorm.weight"] = block.attention_norm.weight
            found[f"model.layers.{i}.post_attention_layernorm.weight"] = block.mlp_norm.weight
            for linear in (
                block.attention.qkv,
                block.attention.o,
                block.mlp.gate_up,
                block.mlp.down,
            ):
                found |= linear.targets()
        return found

    @property
    def num_bytes(self) -> int:
        """Bytes of the weights, a tied head counted once."""
        return sum(p.numel() * p.element_size() for p in self.parameters())
