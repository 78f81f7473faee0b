"""The writer of random PEFT adapter folders, for tests and benches; quick, without PEFT."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from multilora.adapters.peft.tensor_names import ROWS
from multilora.adapters.peft.trained import TOKEN_PATHS
from multilora.config.lora_sites import biased_sites, norm_paths, sites_of
from multilora.config.model import ModelConfig

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

CONFIG = ModelConfig(
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=48,
    vocab_size=64,
    max_position_embeddings=128,
    rms_norm_eps=1e-5,
    rope_theta=10_000.0,
    dtype="float32",
)
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def write_adapter(
    folder: Path,
    config: ModelConfig,
    *,
    rank: int = 8,
    alpha: float = 16,
    seed: int = 0,
    targets: Sequence[str] = LINEARS,
    dtype: torch.dtype = torch.float32,
    layers: Sequence[int] | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    use_rslora: bool = False,
    use_dora: bool = False,
    lora_bias: bool = False,
    bias: str = "none",
    modules_to_save: Sequence[str] = (),
    trainable_token_indices: Sequence[int] = (),
    scale: float | None = 0.1,
    **extra_config: Any,
) -> Path:
    """Writes `adapter_config.json` and `adapter_model.safetensors` into `folder`, and returns it.

    `targets` are last path components, `embed_tokens` and `lm_head` among them; `layers` limits
    them to some layers. A and B are normal with deviation `scale`; None makes the delta a few
    percent of what the base gives, whatever the sizes. `use_dora`, `lora_bias` and `bias` bring
    their tensors, `bias` for a config that has biases, as do `modules_to_save` (of norms and of
    embeddings and heads) and `trainable_token_indices` (of the embedding). `extra_config` is added
    to the config as it is and does not change the tensors.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for site in sites_of(config).values():
        for layer in range(site.layers):
            for index, piece in enumerate(site.slices):
                skipped = layers is not None and not (site.in_layers and layer in layers)
                if skipped or piece.module not in targets:
                    continue
                path = site.module_path(layer, index)
                rows = _rank(rank_pattern or {}, path, rank)
                deviations = (site.in_**-0.5, 0.1 * rows**-0.5) if scale is None else (scale,) * 2
                for name, shape, deviation in zip(
                    _names(site.name),
                    ((rows, site.in_), (piece.out, rows)),
                    deviations,
                    strict=True,
                ):
                    values = torch.randn(shape, generator=generator) * deviation
                    tensors[f"base_model.model.{path}.{name}"] = values.to(dtype)
                if use_dora:  # lengths about those of the tests' random weights
                    values = torch.rand(piece.out, generator=generator) + 0.5
                    name = f"base_model.model.{path}.lora_magnitude_vector"
                    tensors[name] = (values * 0.1 * site.in_**0.5).to(dtype)
                if lora_bias:
                    values = torch.randn(piece.out, generator=generator) * 0.1
                    tensors[f"base_model.model.{path}.lora_B.bias"] = values.to(dtype)
    tensors |= _base_biases(config, targets, bias, dtype, generator)
    tensors |= _in_full(config, modules_to_save, trainable_token_indices, dtype, generator)
    folder.mkdir(parents=True, exist_ok=True)
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": list(targets),
        "layers_to_transform": None if layers is None else list(layers),
        "rank_pattern": dict(rank_pattern or {}),
        "alpha_pattern": dict(alpha_pattern or {}),
        "use_rslora": use_rslora,
        "use_dora": use_dora,
        "lora_bias": lora_bias,
        "bias": bias,
        "modules_to_save": list(modules_to_save) or None,
        "trainable_token_indices": list(trainable_token_indices) or None,
        **extra_config,
    }
    (folder / "adapter_config.json").write_text(json.dumps(fields, indent=2))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def _in_full(
    config: ModelConfig,
    names: Sequence[str],
    token_ids: Sequence[int],
    dtype: torch.dtype,
    generator: torch.Generator,
) -> dict[str, torch.Tensor]:
    """Norms, whole embeddings and heads, and rows of the embedding."""
    hidden, tensors = config.hidden_size, {}
    for path in norm_paths(config):
        if path.endswith(tuple(names)):
            tensors[f"{path}.weight"] = 1 + 0.3 * torch.randn(hidden, generator=generator)
    for path in TOKEN_PATHS.values():
        if path.endswith(tuple(names)):
            values = torch.randn(config.vocab_size, hidden, generator=generator)
            tensors[f"{path}.weight"] = 0.3 * values
    if token_ids:
        values = 0.3 * torch.randn(len(token_ids), hidden, generator=generator)
        tensors[f"model.embed_tokens.{ROWS}"] = values
    return {f"base_model.model.{name}": values.to(dtype) for name, values in tensors.items()}


def _base_biases(
    config: ModelConfig,
    targets: Sequence[str],
    kind: str,
    dtype: torch.dtype,
    generator: torch.Generator,
) -> dict[str, torch.Tensor]:
    """What PEFT saves with `bias`: of all linears that have one, or of those with LoRA."""
    tensors = {}
    for site in biased_sites(config):
        for layer in range(site.layers):
            for index, piece in enumerate(site.slices):
                is_target = piece.module in targets
                if kind == "none" or (kind == "lora_only" and not is_target):
                    continue
                path = f"base_model.model.{site.module_path(layer, index)}"
                values = torch.randn(piece.out, generator=generator) * 0.1
                name = f"{path}.base_layer.bias" if is_target else f"{path}.bias"
                tensors[name] = values.to(dtype)
    return tensors


def change_config(folder: Path, **fields: Any) -> None:
    """Sets fields of `adapter_config.json`."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Rewrites the tensors after `change` has edited their dict."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def _names(site: str) -> tuple[str, str]:
    if site == "embed":
        return "lora_embedding_A", "lora_embedding_B"
    return "lora_A.weight", "lora_B.weight"


def _rank(patterns: Mapping[str, int], path: str, default: int) -> int:
    for key, rank in patterns.items():
        if re.match(rf"(.*\.)?({key})$", path):
            return rank
    return default
