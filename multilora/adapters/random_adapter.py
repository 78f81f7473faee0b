"""Random adapters of a model's shape, to measure speed and memory without training."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection

import torch

from ..config.lora_sites import sites_of
from ..config.model import ModelConfig
from .peft.reader import Adapter, LoraModule
from .peft.trained import ModuleKey


def random_adapter(
    config: ModelConfig,
    rank: int,
    seed: int,
    sites: Collection[str] = ("qkv", "o", "gate_up", "down"),
    dtype: torch.dtype = torch.bfloat16,
) -> Adapter:
    """An adapter of all slices of these sites. The layers share their tensors, to be quick."""
    generator = torch.Generator().manual_seed(seed)
    modules: dict[ModuleKey, LoraModule] = {}
    for site in sites_of(config).values():
        if site.name not in sites:
            continue
        for index, part in enumerate(site.slices):
            a = torch.randn(rank, site.in_, generator=generator) / math.sqrt(site.in_)
            b = torch.randn(part.out, rank, generator=generator) * 0.1 / math.sqrt(rank)
            module = LoraModule(a.to(dtype), b.to(dtype), scale=1.0)
            modules |= {(site.name, layer, index): module for layer in range(site.layers)}
    name = f"random {config} {rank} {seed} {sorted(sites)} {dtype}"
    return Adapter(hashlib.sha256(name.encode()).hexdigest(), modules, rank)
