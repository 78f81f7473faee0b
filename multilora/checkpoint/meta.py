"""Meta's layout: `consolidated.*.pth`, split over ranks, under Meta's names."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..config.model import MetaFacts, ModelConfig
from ..errors import CheckpointError
from .parts import EMBEDDING, HEAD, CheckpointWeight, is_ignored, some_of

if TYPE_CHECKING:
    from collections.abc import Mapping


_META_TOP = {
    "tok_embeddings.weight": EMBEDDING,
    "norm.weight": "model.norm.weight",
    "output.weight": HEAD,
}
_META_LAYER = {
    "attention.wq.weight": "self_attn.q_proj.weight",
    "attention.wk.weight": "self_attn.k_proj.weight",
    "attention.wv.weight": "self_attn.v_proj.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
    "feed_forward.w1.weight": "mlp.gate_proj.weight",
    "feed_forward.w2.weight": "mlp.down_proj.weight",
    "feed_forward.w3.weight": "mlp.up_proj.weight",
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
}


def _open_meta_shards(folder: Path) -> dict[Path, dict[str, Tensor]]:
    """The tensors of `consolidated.00.pth`, `.01.pth`, ... by file: mapped, not read.

    Only tensors are unpickled, so a file cannot run code. Raises CheckpointError for a gap in the
    numbers, a damaged file, or anything that is not a table of plain tensors.
    """
    files = sorted(folder.glob("consolidated.*.pth"))
    wanted = [folder / f"consolidated.{i:02d}.pth" for i in range(len(files))]
    if files != wanted:
        lost = next(file for file in wanted if file not in files)
        raise CheckpointError(f"{folder} lacks {lost.name}; download it again")
    shards: dict[Path, dict[str, Tensor]] = {}
    for file in files:
        try:
            content = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        except Exception as error:  # a damaged pickle can raise anything
            raise CheckpointError(
                f"{file} cannot be read: it is damaged, older than PyTorch 1.6, or holds more than "
                f"tensors ({type(error).__name__})"
            ) from error
        if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
            raise CheckpointError(f"{file} holds no table of tensors by name")
        for name, value in content.items():
            plain = isinstance(value, torch.Tensor) and value.layout == torch.strided
            if not plain or value.device.type != "cpu":
                raise CheckpointError(f"{file}: {name} is not a plain tensor")
        shards[file] = content
    return shards


def meta_facts(folder: Path, raw: Mapping[str, object]) -> MetaFacts | None:
    """From the names and shapes in `consolidated.*.pth`; None if there is no such file."""
    shards = list(_open_meta_shards(folder).values())
    if not shards:
        return None
    embedding = shards[0].get("tok_embeddings.weight")
    if embedding is None or embedding.dim() != 2:
        raise CheckpointError(f"{folder}/consolidated.00.pth lacks a matrix tok_embeddings.weight")
    # Llama 3 splits the vocabulary over the shards, Llama 2 the features.
    rows, features = embedding.shape
    return MetaFacts(
        vocab_size=rows * len(shards) if features == raw.get("dim") else rows,
        dtype=str(embedding.dtype).removeprefix("torch."),
        tied="output.weight" not in shards[0],
    )


def meta_weights(folder: Path, config: ModelConfig) -> dict[str, CheckpointWeight]:
    shards = _open_meta_shards(folder)
    weights: dict[str, CheckpointWeight] = {}
    for name in dict.fromkeys(name for shard in shards.values() for name in shard):
        if is_ignored(name):
            continue
        lacking = [file.name for file, shard in shards.items() if name not in shard]
        if lacking:
            raise CheckpointError(f"{folder}: {name} is missing in {some_of(lacking)}")
        pieces = [shard[name] for shard in shards.values()]
        weights[_hf_name(name)] = _meta_weight(name, pieces, next(iter(shards)), config)
    return weights


def _hf_name(name: str) -> str:
    """The Hugging Face name of a Meta weight; a name that Llama does not have stays as it is."""
    if name in _META_TOP:
        return _META_TOP[name]
    root, _, rest = name.partition(".")
    layer, _, part = rest.partition(".")
    if root == "layers" and layer.isdecimal() and part in _META_LAYER:
        return f"model.layers.{layer}.{_META_LAYER[part]}"
    return name


def _meta_weight(
    name: str, pieces: list[Tensor], file: Path, config: ModelConfig
) -> CheckpointWeight:
    dim = _split_dim(name, pieces[0], config)
    if dim is None:
        pieces = pieces[:1]  # every shard holds the same
    first = pieces[0]
    if any(p.dtype != first.dtype for p in pieces) or len({_without(dim, p) for p in pieces}) > 1:
        seen = ", ".join(f"{list(p.shape)} {p.dtype}" for p in pieces)
        raise CheckpointError(f"{file.parent}: the shards of {name} do not fit together: {seen}")
    shape = list(first.shape)
    if dim is not None:
        shape[dim] = sum(p.shape[dim] for p in pieces)
    rotated = name.endswith((".wq.weight", ".wk.weight"))
    read = partial(_read_meta, pieces, dim, config.head_dim if rotated else None)
    return CheckpointWeight(tuple(shape), _dtype_name(first.dtype), file, read)


def _split_dim(
    name: str,
    piece: Tensor,  # of the first shard
    config: ModelConfig,
) -> int | None:
    """The dimension along which model-parallel shards split a weight; None if they repeat it."""
    if piece.dim() != 2:
        return None
    if name.endswith((".wo.weight", ".w2.weight")):
        return 1
    if name == "tok_embeddings.weight":  # Llama 2 splits the features, Llama 3 the vocabulary
        return 0 if piece.shape[1] == config.hidden_size else 1
    return 0


def _without(dim: int | None, piece: Tensor) -> tuple[int, ...]:
    return tuple(size for i, size in enumerate(piece.shape) if i != dim)


def _read_meta(pieces: list[Tensor], dim: int | None, head_dim: int | None) -> Tensor:
    """One whole weight in the row order of Hugging Face.

    Meta rotates neighbouring rows of a head, `(0, 1), (2, 3), ...`; Hugging Face rotates its first
    half with its second, so rows 0, 2, 4, ... come first, then 1, 3, 5, ... The query and key
    matrices are copied once more than the others for it, and are far from the largest.
    """
    whole = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim or 0)
    if head_dim is None:
        return whole
    return whole.view(-1, head_dim // 2, 2, whole.shape[1]).transpose(1, 2).reshape(whole.shape)


def _dtype_name(dtype: torch.dtype) -> str:
    known = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    return known.get(dtype, str(dtype).removeprefix("torch."))
