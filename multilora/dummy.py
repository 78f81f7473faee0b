"""Random models and adapters of a given shape, to measure speed without a checkpoint."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from .adapters.format import Adapter, LoraModule, ModuleKey
from .checkpoint import Part
from .config import ModelConfig, RopeScaling
from .errors import CheckpointError
from .sites import sites_of

_LLAMA_31_8B = ModelConfig(
    hidden_size=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    intermediate_size=14336,
    vocab_size=128256,
    max_position_embeddings=131_072,
    rms_norm_eps=1e-5,
    rope_theta=500_000.0,
    rope_scaling=RopeScaling(
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    ),
    bos_token_id=128000,
    eos_token_ids=(128001, 128008, 128009),
)
SHAPES = {
    "llama-3.1-8b": _LLAMA_31_8B,
    "llama-3.1-70b": replace(
        _LLAMA_31_8B, hidden_size=8192, num_layers=80, num_heads=64, intermediate_size=28672
    ),
    "llama-3.2-1b": replace(
        _LLAMA_31_8B,
        hidden_size=2048,
        num_layers=16,
        head_dim=64,
        intermediate_size=8192,
        rope_scaling=RopeScaling(
            factor=32.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=8192,
        ),
        tie_word_embeddings=True,
    ),
}
"""Published shapes by name; "llama-3.1-70b:4" is the one with 4 of its layers."""


def shape_of(model: str) -> ModelConfig:
    """The shape that a name of SHAPES or a folder with a config.json means."""
    name, colon, layers = model.partition(":")
    if name not in SHAPES:
        if not Path(model).is_dir():
            raise CheckpointError(
                f"load_format='dummy': {model!r} is neither a folder with a config.json nor one of "
                f"{', '.join(SHAPES)} (with :N for N layers)"
            )
        return ModelConfig.from_dir(model)
    if not colon:
        return SHAPES[name]
    if not layers.isdecimal() or int(layers) < 1:
        raise CheckpointError(f"load_format='dummy': {model!r} must end in a number of layers")
    return replace(SHAPES[name], num_layers=int(layers))


def load_random(parts: Iterable[Part], seed: int, dtype: torch.dtype, device: torch.device) -> None:
    """Loads every part of a model: deviation 1 / sqrt(inputs), norms 1, biases 0."""
    generator = torch.Generator(device).manual_seed(seed)

    def weight(name: str, shape: tuple[int, ...]) -> Tensor:
        if len(shape) == 1:
            return torch.full(shape, float(not name.endswith(".bias")), dtype=dtype, device=device)
        found = torch.empty(shape, dtype=dtype, device=device)
        return found.normal_(0, 1 / math.sqrt(shape[1]), generator=generator)

    parts = list(parts)
    shapes = dict(item for part in parts for item in part.shapes.items())
    with torch.no_grad():
        for part in parts:
            part.load(lambda name: weight(name, shapes[name]))


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
