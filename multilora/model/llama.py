"""Llama 2, 3, 3.1, 3.2 and 3.3, whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from types import MappingProxyType

import torch
from torch import Tensor, nn

from ..checkpoint.parts import Part, fill
from ..config.lora_sites import Site, norm_paths, sites_of
from ..config.model import ModelConfig
from ..config.quantization import Scheme
from .forward_batch import ForwardBatch
from .kv_cache import KVCache
from .layers import MLP, Attention, RMSNorm
from .lora_linear import Linear, LoraEmbedding, LoraLinear
from .rope import Rope


class DecoderLayer(nn.Module):
    """One decoder layer."""

    def __init__(
        self,
        config: ModelConfig,
        sites: dict[str, Site],
        layer: int,
        dtype: torch.dtype,
        schemes: Mapping[str, Scheme],
    ) -> None:
        super().__init__()
        self.attention = Attention(config, sites, layer, dtype, schemes)
        self.mlp = MLP(config, sites, layer, dtype, schemes)
        size, eps = config.hidden_size, config.rms_norm_eps
        self.attention_norm = RMSNorm(size, eps, dtype, 2 * layer)
        self.mlp_norm = RMSNorm(size, eps, dtype, 2 * layer + 1)

    def forward(
        self, x: Tensor, residual: Tensor, batch: ForwardBatch, cache: KVCache, rope: Rope
    ) -> Tensor:
        """x is what the last part adds; the running sum is `residual`, changed in place."""
        x = self.attention(self.attention_norm(x, residual, batch), batch, cache, rope)
        y: Tensor = self.mlp(self.mlp_norm(x, residual, batch), batch)
        return y


class Llama(nn.Module):
    """A Llama for causal language modelling, with LoRA per row of the batch.

    Its weights are there when all of its `parts` are loaded.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        schemes: Mapping[str, Scheme] = MappingProxyType({}),  # of the sites that are quantised
    ) -> None:
        super().__init__()
        sites = sites_of(config)
        self.config, self.dtype = config, dtype
        self.head = LoraLinear(sites["lm_head"], 0, dtype, scheme=schemes.get("lm_head"))
        tied = self.head.base if config.tie_word_embeddings else None
        self.embed = LoraEmbedding(config.vocab_size, config.hidden_size, dtype, tied)
        self.blocks = nn.ModuleList(
            DecoderLayer(config, sites, i, dtype, schemes) for i in range(config.num_layers)
        )
        last = 2 * config.num_layers
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype, last)
        self.rope = Rope(config, self.norm.weight.device)

    def forward(self, batch: ForwardBatch, cache: KVCache) -> Tensor:
        """Logits [logits_rows, vocab] of the tokens that `batch.logits_rows` names."""
        x = self.embed(batch)
        residual = torch.zeros_like(x)
        for block in self.blocks:
            x = block(x, residual, batch, cache, self.rope)
        x = self.norm(x, residual, batch)
        if batch.logits_rows is not None:
            x = x[batch.logits_rows]
        logits: Tensor = self.head(x, batch)
        return logits

    def parts(self) -> Iterator[Part]:
        """What is to be loaded, under Hugging Face's names."""
        yield self.embed.part()
        if self.embed.tied is None:
            yield self.head.part()
        for block in self.blocks:
            assert isinstance(block, DecoderLayer)
            yield block.attention.qkv.part()
            yield block.attention.o.part()
            yield block.mlp.gate_up.part()
            yield block.mlp.down.part()
        paths = norm_paths(self.config)
        yield fill({f"{path}.weight": self.norm_at(i).weight for i, path in enumerate(paths)})

    def norm_at(self, index: int) -> RMSNorm:
        """A norm by its place in `norm_paths`."""
        if index == 2 * len(self.blocks):
            return self.norm
        block = self.blocks[index // 2]
        assert isinstance(block, DecoderLayer)
        return block.mlp_norm if index % 2 else block.attention_norm

    def linear(self, site: str, layer: int) -> Linear:
        """The base's linear of a site, the embedding aside."""
        if site == "lm_head":
            return self.head.base
        block = self.blocks[layer]
        assert isinstance(block, DecoderLayer)
        of_site = {
            "qkv": block.attention.qkv,
            "o": block.attention.o,
            "gate_up": block.mlp.gate_up,
            "down": block.mlp.down,
        }
        return of_site[site].base

    @torch.inference_mode()
    def columns(self, site: str, layer: int, first: int, last: int) -> Tensor:
        """Weights of output columns of a site, as they are served: fp32 [last - first, in]."""
        device, vocab = self.norm.weight.device, self.config.vocab_size
        if site != "embed":
            ids = torch.arange(first, last, device=device)
            return self.linear(site, layer).rows(ids, torch.float32)
        if self.embed.tied is None:
            return self.embed.weight[:, first:last].T.float()
        rows = self.embed.tied.rows(torch.arange(vocab, device=device), torch.float32)
        return rows[:, first:last].T

    @torch.inference_mode()
    def token_rows(self, site: str, ids: Tensor) -> Tensor:
        """Rows of the embedding or the head as they are served, by ids: fp32 [rows, hidden]."""
        ids = ids.to(self.norm.weight.device)
        if site == "embed" and self.embed.tied is None:
            return self.embed.weight[ids].float()
        return self.head.base.rows(ids, torch.float32)

    def norm_weight(self, index: int) -> Tensor:
        """The weight of a norm, [hidden], by its place in `norm_paths`."""
        return self.norm_at(index).weight

    def bias(self, site: str, layer: int) -> Tensor | None:
        """The bias of a site, [out]; None if it has none."""
        return None if site == "embed" else self.linear(site, layer).bias

    @cached_property
    def rows_are_independent(self) -> bool:
        """Whether rows need no padding; asked when everything is loaded."""
        return all(m.rows_are_independent for m in self.modules() if isinstance(m, Linear))

    @property
    def num_bytes(self) -> int:
        """Bytes of the weights, a tied head counted once."""
        linears = sum(m.num_bytes for m in self.modules() if isinstance(m, Linear))
        return linears + sum(p.numel() * p.element_size() for p in self.parameters())
