"""Shapes of known models by name, to measure speed without a checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ..arguments import folder
from ..errors import CheckpointError, shown
from .model import ModelConfig
from .rope import RopeScaling

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
        if not Path(folder(model, "a model", CheckpointError)).is_dir():
            raise CheckpointError(
                f"{shown(model)} is neither a folder with a config.json nor one of "
                f"{', '.join(SHAPES)} (with :N for N layers)"
            )
        return ModelConfig.from_dir(model)
    if not colon:
        return SHAPES[name]
    if not layers.isdecimal() or int(layers) < 1:
        raise CheckpointError(f"{model!r} must end in a number of layers, e.g. {name}:4")
    return replace(SHAPES[name], num_layers=int(layers))
