"""The writer of random Llama checkpoints, for tests and benches: without transformers."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from multilora.config.lora_sites import sites_of
from multilora.config.model import ModelConfig
from multilora.config.rope import RopeScaling

if TYPE_CHECKING:
    from collections.abc import Mapping

TINY = ModelConfig(
    hidden_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    intermediate_size=96,
    vocab_size=128,
    max_position_embeddings=2048,
    rms_norm_eps=1e-5,
    rope_theta=10_000.0,
    rope_scaling=RopeScaling(
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=256,
    ),
    dtype="float32",
    bos_token_id=1,
    eos_token_ids=(2,),
)


def write_checkpoint(
    folder: str | Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    shards: int = 1,
    config: ModelConfig = TINY,
    extra_config: Mapping[str, Any] = MappingProxyType({}),
    **config_overrides: Any,
) -> ModelConfig:
    """Writes config.json and `shards` safetensors files into `folder`; returns the shape.

    `config_overrides` are fields of ModelConfig that replace those of `config`; `extra_config` is
    added to config.json as it is.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = replace(config, dtype=_name(dtype), **config_overrides)
    (folder / "config.json").write_text(json.dumps({**hf_config(config), **extra_config}, indent=2))
    weights = random_weights(config, seed=seed, dtype=dtype)
    if shards == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return config
    names = list(weights)
    places: dict[str, str] = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: weights[name] for name in names[i::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(part, file)
    size = sum(w.numel() * w.element_size() for w in weights.values())
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return config


def write_meta_checkpoint(
    folder: str | Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    shards: int = 1,
    split_embedding: str = "vocab",
    params_overrides: dict[str, Any] | None = None,
    **config_overrides: Any,
) -> ModelConfig:
    """Writes params.json and `shards` model-parallel consolidated.*.pth; returns the shape.

    The weights are those of `write_checkpoint` with the same seed, dtype and shape, in Meta's names
    and row order. `split_embedding`: "vocab" as in Llama 3, "features" as in Llama 2. Entries of
    `params_overrides` replace those of params.json, e.g. `{"vocab_size": -1}`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = replace(TINY, rope_scaling=None, max_position_embeddings=4096, dtype=_name(dtype))
    config = replace(config, bos_token_id=None, eos_token_ids=())  # params.json has none
    config = replace(config, **config_overrides)
    params = meta_params(config) | (params_overrides or {})
    (folder / "params.json").write_text(json.dumps(params))
    weights = random_weights(config, seed=seed, dtype=dtype)
    parts: list[dict[str, Tensor]] = [{} for _ in range(shards)]
    for name, weight in weights.items():
        meta = _meta_name(name)
        whole = _interleaved(weight, config.head_dim) if "wq" in meta or "wk" in meta else weight
        for part, piece in zip(parts, _split(meta, whole, shards, split_embedding), strict=True):
            part[meta] = piece.clone()
    for i, part in enumerate(parts):
        part["rope.freqs"] = torch.ones(config.head_dim // 2)
        torch.save(part, folder / f"consolidated.{i:02d}.pth")
    return config


def random_weights(
    config: ModelConfig, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Random weights under Hugging Face's names: std 1/sqrt(fan_in), norms around 1."""
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, Tensor] = {}
    for name, shape in weight_shapes(config).items():
        noise = torch.randn(shape, generator=generator)
        if name.endswith("norm.weight"):
            noise = 1 + 0.1 * noise
        elif name.endswith(".bias"):
            noise = 0.1 * noise
        else:
            noise = noise / math.sqrt(shape[-1])
        weights[name] = noise.to(dtype)
    return weights


def weight_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every weight, by Hugging Face's name."""
    hidden = config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {"model.norm.weight": (hidden,)}
    for layer in range(config.num_layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{layer}.{norm}.weight"] = (hidden,)
    for site in sites_of(config).values():
        bias = {"self_attn": config.attention_bias, "mlp": config.mlp_bias}.get(site.parent, False)
        if site.name == "lm_head" and config.tie_word_embeddings:
            continue
        for layer in range(site.layers):
            for i, part in enumerate(site.slices):
                path = site.module_path(layer, i)
                shapes[f"{path}.weight"] = (part.out, site.in_)
                if site.name == "embed":
                    shapes[f"{path}.weight"] = (site.in_, part.out)
                if bias:
                    shapes[f"{path}.bias"] = (part.out,)
    return shapes


LLAMA3 = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
YARN = ("beta_fast", "beta_slow", "attention_factor", "truncate", LLAMA3[2])


def hf_config(config: ModelConfig) -> dict[str, Any]:
    """The contents of config.json, in the spelling of transformers 5."""
    rope: dict[str, Any] = {"rope_theta": config.rope_theta, "rope_type": "default"}
    if config.rope_scaling is not None:
        own = asdict(config.rope_scaling)
        names = {"linear": (), "yarn": YARN, "llama3": LLAMA3}[own["rope_type"]]
        rope |= {name: own[name] for name in ("rope_type", "factor", *names)}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.intermediate_size,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": rope,
        "tie_word_embeddings": config.tie_word_embeddings,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "dtype": config.dtype,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids),
    }


def meta_params(config: ModelConfig) -> dict[str, Any]:
    """The contents of params.json; `ffn_dim_multiplier` is solved for the intermediate size."""
    width = int(8 * config.hidden_size / 3)
    return {
        "dim": config.hidden_size,
        "n_layers": config.num_layers,
        "n_heads": config.num_heads,
        "n_kv_heads": config.num_kv_heads,
        "vocab_size": config.vocab_size,
        "multiple_of": math.gcd(config.intermediate_size, 32),
        "ffn_dim_multiplier": (config.intermediate_size - 0.5) / width,
        "norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _meta_name(name: str) -> str:
    name = name.removeprefix("model.").replace("self_attn.", "attention.")
    name = name.replace("input_layernorm", "attention_norm").replace("mlp.", "feed_forward.")
    name = name.replace("post_attention_layernorm", "ffn_norm")
    name = name.replace("embed_tokens", "tok_embeddings").replace("lm_head", "output")
    for theirs, ours in zip("qkvo", ("wq", "wk", "wv", "wo"), strict=True):
        name = name.replace(f"{theirs}_proj", ours)
    for theirs, ours in (("gate", "w1"), ("down", "w2"), ("up", "w3")):
        name = name.replace(f"{theirs}_proj", ours)
    return name


def _interleaved(
    weight: Tensor,  # [heads * head_dim, hidden], halves rotated with one another
    head_dim: int,
) -> Tensor:
    """The same rows for a model that rotates neighbours: each one is put in its place by number."""
    out = torch.zeros_like(weight)
    half = head_dim // 2
    for row in range(weight.shape[0]):
        head, i = divmod(row, head_dim)
        place = 2 * i if i < half else 2 * (i - half) + 1
        out[head * head_dim + place] = weight[row]
    return out


def _split(name: str, weight: Tensor, shards: int, split_embedding: str) -> tuple[Tensor, ...]:
    if "norm" in name:
        return (weight,) * shards
    by_column = ".wo." in name or ".w2." in name
    if "tok_embeddings" in name:
        by_column = split_embedding == "features"
    return weight.chunk(shards, dim=1 if by_column else 0)
