"""Reads the weights of a Llama checkpoint, one tensor at a time, under Hugging Face's names.

Two layouts are known: Hugging Face's (`model.safetensors`, or shards with an index) and Meta's
(`consolidated.*.pth`). Both become a table of weights that are not read yet, so that names, shapes
and dtypes are checked before the first byte of a weight is copied. The model says in which parts it
is loaded; what a part needs beside the model itself is gone before the next one begins.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..arguments import folder as checked_folder
from ..config.model import ModelConfig, read_json
from ..errors import CheckpointError
from .hf import hf_weights, safetensors_files
from .meta import meta_facts, meta_weights
from .parts import DTYPES, EMBEDDING, HEAD, CheckpointWeight, Part, some_of

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping


def read_config(folder: str | Path) -> ModelConfig:
    """The shape of the checkpoint's model. Meta's weights are asked for what params.json omits."""
    folder = Path(checked_folder(folder, "a model's folder", CheckpointError))
    if (folder / "config.json").is_file() or not (folder / "params.json").is_file():
        return ModelConfig.from_dir(folder)
    raw = read_json(folder / "params.json")
    return ModelConfig.from_meta(raw, meta_facts(folder, raw))


def load_checkpoint(folder: str | Path, parts: Iterable[Part], config: ModelConfig) -> None:
    """Loads the parts of a model, one after another.

    Names, shapes and dtypes are checked before any part is loaded, and that a stored head of a
    model with tied embeddings repeats the embedding.
    """
    folder, parts = Path(folder), list(parts)
    shapes = dict(item for part in parts for item in part.shapes.items())
    weights = _weights(folder, config)
    head = weights.pop(HEAD, None) if config.tie_word_embeddings else None
    _check_names(folder, weights, shapes)
    for name, weight in weights.items():
        _check_weight(name, weight, shapes[name])
    if head is not None:
        _check_weight(HEAD, head, shapes[EMBEDDING])
        _check_tied(head, weights[EMBEDDING])
    with torch.no_grad():
        for part in parts:
            part.load(lambda name: weights[name].read())


def read_base_weight(folder: str | Path, site: str, config: ModelConfig) -> Tensor:
    """The checkpoint's own matrix of site "embed" or "lm_head", in its dtype."""
    own_head = site == "lm_head" and not config.tie_word_embeddings
    return _weights(Path(folder), config)[HEAD if own_head else EMBEDDING].read()


def _weights(folder: Path, config: ModelConfig) -> dict[str, CheckpointWeight]:
    files = safetensors_files(folder)
    if files:
        return hf_weights(files)
    if any(folder.glob("consolidated.*.pth")):
        return meta_weights(folder, config)
    if any(folder.glob("pytorch_model*.bin")):
        raise CheckpointError(
            f"{folder} holds only pytorch_model.bin files, which are pickles and are not read; "
            "convert them to safetensors"
        )
    raise CheckpointError(
        f"{folder} holds no weights: expected model.safetensors, model.safetensors.index.json "
        "or consolidated.00.pth"
    )


def _check_names(
    folder: Path, weights: Mapping[str, CheckpointWeight], wanted: Collection[str]
) -> None:
    missing = [name for name in wanted if name not in weights]
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of the model's {len(wanted)} weights: "
            f"{some_of(missing)}; "
            "the download is incomplete, or the config is of another model"
        )
    extra = [name for name in weights if name not in wanted]
    if extra:
        raise CheckpointError(
            f"{folder} holds {len(extra)} weights that the model does not have: {some_of(extra)}; "
            "the config is of another model, or the checkpoint is not a plain Llama"
        )


def _check_weight(name: str, weight: CheckpointWeight, want: tuple[int, ...]) -> None:
    if weight.dtype not in DTYPES:
        raise CheckpointError(
            f"{weight.file}: {name} has dtype {weight.dtype}; supported: {', '.join(DTYPES)}"
        )
    if weight.shape != want:
        raise CheckpointError(
            f"{weight.file}: {name} has shape {list(weight.shape)}, "
            f"but the config asks for {list(want)}"
        )


def _check_tied(head: CheckpointWeight, embedding: CheckpointWeight) -> None:
    """Accepts the head of a model with tied embeddings if it repeats the embedding.

    One of the two may be stored as a rounding of the other.
    """
    rows = 1024  # at a time, so that no second cast copy of the whole matrix is made
    pairs = zip(torch.split(head.read(), rows), torch.split(embedding.read(), rows), strict=True)
    if not all(torch.equal(h.to(e.dtype), e) or torch.equal(h, e.to(h.dtype)) for h, e in pairs):
        raise CheckpointError(
            f"{head.file}: the config ties {HEAD} to the embedding, but they differ; "
            f'set "tie_word_embeddings": false in config.json, or remove {HEAD}'
        )
