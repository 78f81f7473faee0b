"""Reads the weights of a Llama checkpoint, one tensor at a time, under Hugging Face's names.

Two layouts are known: Hugging Face's (`model.safetensors`, or shards with an index) and Meta's
(`consolidated.*.pth`). Both become a table of weights that are not read yet, so that names, shapes
and dtypes are checked before the first byte of a weight is copied. The model says in which parts it
is loaded; what a part needs beside the model itself is gone before the next one begins.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .config import MetaFacts, ModelConfig, read_json
from .errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping

MAX_HEADER_BYTES = 64 << 20  # a header of a 405B model is under 1 MiB
DTYPES = ("F32", "F16", "BF16")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

# Tables of rotary frequencies that old files carry; they follow from the config.
_IGNORED = ("*.rotary_emb.inv_freq", "rope.freqs")

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


@dataclass(frozen=True, slots=True)
class Part:
    """What is loaded at one go, such as a fused linear."""

    shapes: Mapping[str, tuple[int, ...]]  # of its weights, by Hugging Face's names
    # Takes a function that reads one of these weights, in the checkpoint's dtype; what it returns
    # may be a view of a mapped file: to be copied, never written to.
    load: Callable[[Callable[[str], Tensor]], None]


def fill(targets: Mapping[str, Tensor]) -> Part:
    """The part that copies each weight into its target, cast once to the target's dtype."""

    def load(read: Callable[[str], Tensor]) -> None:
        for name, target in targets.items():
            target.copy_(read(name))

    return Part({name: tuple(target.shape) for name, target in targets.items()}, load)


@dataclass(frozen=True, slots=True)
class _Weight:
    """One weight of a checkpoint that is not read yet."""

    shape: tuple[int, ...]
    dtype: str  # as safetensors spells it, e.g. "BF16"
    file: Path  # where it lies; the first file of a weight that is split over several
    read: Callable[[], Tensor]


def read_config(folder: str | Path) -> ModelConfig:
    """The shape of the checkpoint's model. Meta's weights are asked for what params.json omits."""
    folder = Path(folder)
    if (folder / "config.json").is_file() or not (folder / "params.json").is_file():
        return ModelConfig.from_dir(folder)
    raw = read_json(folder / "params.json")
    return ModelConfig.from_meta(raw, _meta_facts(folder, raw))


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


def _weights(folder: Path, config: ModelConfig) -> dict[str, _Weight]:
    files = _safetensors_files(folder)
    if files:
        return _hf_weights(files)
    if any(folder.glob("consolidated.*.pth")):
        return _meta_weights(folder, config)
    if any(folder.glob("pytorch_model*.bin")):
        raise CheckpointError(
            f"{folder} holds only pytorch_model.bin files, which are pickles and are not read; "
            "convert them to safetensors"
        )
    raise CheckpointError(
        f"{folder} holds no weights: expected model.safetensors, model.safetensors.index.json "
        "or consolidated.00.pth"
    )


# ---- checks


def _check_names(folder: Path, weights: Mapping[str, _Weight], wanted: Collection[str]) -> None:
    missing = [name for name in wanted if name not in weights]
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of the model's {len(wanted)} weights: "
            f"{_some(missing)}; "
            "the download is incomplete, or the config is of another model"
        )
    extra = [name for name in weights if name not in wanted]
    if extra:
        raise CheckpointError(
            f"{folder} holds {len(extra)} weights that the model does not have: {_some(extra)}; "
            "the config is of another model, or the checkpoint is not a plain Llama"
        )


def _check_weight(name: str, weight: _Weight, want: tuple[int, ...]) -> None:
    if weight.dtype not in DTYPES:
        raise CheckpointError(
            f"{weight.file}: {name} has dtype {weight.dtype}; supported: {', '.join(DTYPES)}"
        )
    if weight.shape != want:
        raise CheckpointError(
            f"{weight.file}: {name} has shape {list(weight.shape)}, "
            f"but the config asks for {list(want)}"
        )


def _check_tied(head: _Weight, embedding: _Weight) -> None:
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


def _some(names: list[str], shown: int = 5) -> str:
    rest = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {rest} more" if rest > 0 else "")


def _ignored(name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in _IGNORED)


# ---- Hugging Face


def _safetensors_files(folder: Path) -> list[Path]:
    """The safetensors files of a Hugging Face folder; empty if it has none."""
    single = folder / "model.safetensors"
    if single.is_file():
        return [single]
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return []
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{index} has no weight_map of tensor names to files")
    for name, place in places.items():
        if not isinstance(place, str) or not _is_plain_file_name(place):
            raise CheckpointError(
                f"{index} puts {name} into {place!r}, which is no safetensors file of this folder"
            )
    files = [folder / place for place in sorted(set(places.values()))]
    lost = [file.name for file in files if not file.is_file()]
    if lost:
        raise CheckpointError(
            f"{folder} lacks {len(lost)} of the {len(files)} files that its index names: "
            f"{_some(lost)}; download them again"
        )
    return files


def _is_plain_file_name(name: str) -> bool:
    return name.endswith(".safetensors") and not set(name) & set("/\\:\0")


def _hf_weights(files: list[Path]) -> dict[str, _Weight]:
    weights: dict[str, _Weight] = {}
    for file in files:
        _check_header_size(file)
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.offset_keys():
                    if _ignored(name):
                        continue
                    if name in weights:
                        raise CheckpointError(f"{name} is in both {weights[name].file} and {file}")
                    view = opened.get_slice(name)
                    read = partial(_read_safetensor, file, name)
                    weights[name] = _Weight(tuple(view.get_shape()), view.get_dtype(), file, read)
        except (SafetensorError, OSError) as error:
            raise _damaged(file, error) from error
    return weights


def _read_safetensor(file: Path, name: str) -> Tensor:
    # The file is opened for one tensor at a time: closing it returns the pages that were touched,
    # which would otherwise count as the process's memory until the whole shard is read.
    try:
        with safe_open(file, framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(name)
            return tensor
    except (SafetensorError, OSError) as error:
        raise _damaged(file, error) from error


def _check_header_size(file: Path) -> None:
    """Refuses a header that would cost seconds and gigabytes to parse."""
    try:
        with file.open("rb") as opened:
            start = opened.read(8)
    except OSError as error:
        raise _damaged(file, error) from error
    if len(start) < 8:
        raise CheckpointError(f"{file} is no safetensors file: it has {len(start)} bytes")
    (size,) = struct.unpack("<Q", start)
    if size > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{file} is no safetensors file, or is damaged: "
            f"its header claims {size} bytes, over the limit of {MAX_HEADER_BYTES}"
        )


def _damaged(file: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{file} cannot be read as safetensors: {error}; download it again")


# ---- Meta


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


def _meta_facts(folder: Path, raw: Mapping[str, object]) -> MetaFacts | None:
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


def _meta_weights(folder: Path, config: ModelConfig) -> dict[str, _Weight]:
    shards = _open_meta_shards(folder)
    weights: dict[str, _Weight] = {}
    for name in dict.fromkeys(name for shard in shards.values() for name in shard):
        if _ignored(name):
            continue
        lacking = [file.name for file, shard in shards.items() if name not in shard]
        if lacking:
            raise CheckpointError(f"{folder}: {name} is missing in {_some(lacking)}")
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


def _meta_weight(name: str, pieces: list[Tensor], file: Path, config: ModelConfig) -> _Weight:
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
    return _Weight(tuple(shape), _dtype_name(first.dtype), file, read)


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
