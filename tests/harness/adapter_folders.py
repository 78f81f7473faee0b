"""The writer of random PEFT adapter folders, for tests and benches; quick, without PEFT."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from multilora.config.lora_sites import sites_of
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
    scale: float | None = 0.1,
    **extra_config: Any,
) -> Path:
    """Writes `adapter_config.json` and `adapter_model.safetensors` into `folder`, and returns it.

    `targets` are last path components, `embed_tokens` and `lm_head` among them; `layers` limits
    them to some layers. A and B are normal with deviation `scale`; None makes the delta a few
    percent of what the base gives, whatever the sizes. `extra_config` is added to the config as it
    is and does not change the tensors.
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
        "bias": "none",
        **extra_config,
    }
    (folder / "adapter_config.json").write_text(json.dumps(fields, indent=2))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


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
