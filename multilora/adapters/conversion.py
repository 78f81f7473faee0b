"""Adapters in other forms, written as PEFT's folder: MLX-LM's, and PEFT's with pickled weights.

MLX-LM keeps A as [in, rank] and B as [rank, out], with `scale` as the whole factor; the names of
the modules are those of the checkpoint.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from ..errors import AdapterInvalid, shown
from .peft.config import MAX_CONFIG_BYTES
from .peft.files import CONFIG_FILE, open_regular, strict_json
from .peft.reader import PICKLE_FILE, WEIGHTS_FILE
from .peft.tensor_names import PREFIX
from .peft.weights import MAX_FILE_BYTES, read_header, read_weights

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

MLX_WEIGHTS_FILE = "adapters.safetensors"
MLX_PARTS = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "m": "lora_magnitude_vector"}


def convert(folder: str | Path, out: str | Path, *, scale: float | None = None) -> str:
    """Writes the adapter in `folder` as a PEFT folder `out`, which must not exist.

    Returns what it was. `scale` is the factor of an MLX-LM adapter, instead of the one that its
    config gives. Pickled weights are read by torch's reader of plain tensors, which runs no code.
    Raises AdapterInvalid for what is neither, or cannot be written in PEFT's form; then there is no
    `out`.
    """
    source, target = Path(folder), Path(out)
    if target.exists():
        raise AdapterInvalid(f"{shown(str(out))} exists; name a folder that does not")
    with open_regular(source / CONFIG_FILE, MAX_CONFIG_BYTES) as file:
        config = strict_json(file.read(MAX_CONFIG_BYTES), CONFIG_FILE)
    if "lora_parameters" in config or "fine_tune_type" in config:
        kind, (fields, tensors) = "an adapter of MLX-LM", _from_mlx(source, config, scale)
    elif scale is not None:
        raise AdapterInvalid("a scale is for adapters of MLX-LM; this one has lora_alpha")
    elif (source / PICKLE_FILE).exists() and not (source / WEIGHTS_FILE).exists():
        kind, fields, tensors = "a PEFT adapter with pickled weights", config, _unpickled(source)
    else:
        raise AdapterInvalid(
            f"{shown(str(folder))} is neither an adapter of MLX-LM nor one of PEFT with "
            f"{PICKLE_FILE}; if it is a PEFT folder, it can be served as it is"
        )
    _write(target, fields, tensors)
    return kind


def _from_mlx(
    folder: Path, config: Mapping[str, Any], scale: float | None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """PEFT's config and tensors of an MLX-LM folder."""
    kind = config.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        raise AdapterInvalid(
            f"fine_tune_type={shown(kind)} is refused: it is no LoRA; fuse it into its base"
        )
    parameters = config.get("lora_parameters")
    if not isinstance(parameters, dict):
        raise AdapterInvalid("the config has no lora_parameters")
    rank = parameters.get("rank")
    if type(rank) is not int or rank < 1:
        raise AdapterInvalid(f"lora_parameters: rank must be a positive integer, not {shown(rank)}")
    factor = _scale(parameters, rank) if scale is None else scale
    with open_regular(folder / MLX_WEIGHTS_FILE, MAX_FILE_BYTES) as file:
        stored = read_weights(file, read_header(file))
    tensors, paths = {}, set()
    for name, weight in stored.items():
        path, _, part = name.rpartition(".")
        if part not in MLX_PARTS or (part == "m") > (kind == "dora"):
            raise AdapterInvalid(f"unexpected tensor {shown(name)} of an MLX-LM {kind} adapter")
        if path.endswith("embed_tokens"):
            raise AdapterInvalid(
                f"tensor {shown(name)}: MLX-LM's adapters of embeddings also change a tied head, "
                "which PEFT's do not; train without embed_tokens"
            )
        paths.add(path)
        turned = weight.tensor if part == "m" else weight.tensor.T.contiguous()
        tensors[f"{PREFIX}{path}.{MLX_PARTS[part]}"] = turned
    base = config.get("model")
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base if isinstance(base, str) else None,
        "r": rank,
        "lora_alpha": factor * rank,
        "target_modules": sorted(paths),
        "use_dora": kind == "dora",
    }, tensors


def _scale(parameters: Mapping[str, Any], rank: int) -> float:
    """The factor of B A. Early versions of MLX-LM multiplied it by alpha / rank, others do not."""
    scale, alpha = parameters.get("scale"), parameters.get("alpha")
    if not isinstance(scale, int | float) or isinstance(scale, bool) or not math.isfinite(scale):
        raise AdapterInvalid(f"lora_parameters: scale must be a finite number, not {shown(scale)}")
    if alpha is not None and alpha != rank:
        raise AdapterInvalid(
            f"lora_parameters has alpha={shown(alpha)} beside scale={scale}: versions of MLX-LM "
            f"that wrote it meant scale * alpha / rank, today's take scale={scale} alone; give "
            "the one that is meant by --scale"
        )
    return float(scale)


def _unpickled(folder: Path) -> dict[str, Tensor]:
    with open_regular(folder / PICKLE_FILE, MAX_FILE_BYTES) as file:
        try:
            found = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:
            raise AdapterInvalid(
                f"{PICKLE_FILE} holds more than plain tensors, or is damaged: {error}"[:500]
            ) from error
    if not isinstance(found, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in found.items()
    ):
        raise AdapterInvalid(f"{PICKLE_FILE} does not hold tensors by name")
    return {name: tensor.contiguous().clone() for name, tensor in found.items()}


def _write(target: Path, fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """A folder in whole or not at all."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f"{target.name}.", dir=target.parent))
        try:
            (part / CONFIG_FILE).write_text(json.dumps(fields, indent=2) + "\n")
            save_file(dict(tensors), part / WEIGHTS_FILE, metadata={"format": "pt"})
            os.chmod(part, 0o755)
            part.rename(target)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
    except OSError as error:
        why = error.strerror or error
        raise AdapterInvalid(f"{shown(str(target))} cannot be written: {why}") from error
