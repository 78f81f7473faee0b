"""Reads the weights of a Llama checkpoint, one tensor at a time, under Hugging Face's names.

Two layouts are known: Hugging Face's (`model.safetensors`, or shards with an index) and Meta's
(`consolidated.*.pth`). Both become a table of weights that are not read yet, so that names, shapes
and dtypes are checked before the first byte of a weight is copied, and at most one weight is held
beside the model.
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
    from collections.abc import Callable, Iterator, Mapping

MAX_HEADER_BYTES = 64 << 20  # a header of a 405B model is under 1 MiB
DTYPES = ("F32", "F16", "BF16")

# Tables of rotary frequencies that old files carry; they follow from the config.
_IGNORED = ("*.rotary_emb.inv_freq", "rope.freqs")

_META_TOP = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
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


def load_checkpoint(folder: str | Path, targets: Mapping[str, Tensor], config: ModelConfig) -> None:
    """Copies every weight of the checkpoint into its target, casting once to the target's dtype.

    `targets` maps Hugging Face names to the tensors to fill, which may be views of fused weights.
    All names, shapes and dtypes are checked first: a CheckpointError leaves the targets untouched,
    except where a tied `lm_head.weight` turns out to differ from the embedding.
    """
    folder = Path(folder)
    weights = _weights(folder, config)
    head = weights.pop("lm_head.weight", None) if config.tie_word_embeddings else None
    _check_names(folder, weights, targets)
    for name, weight in weights.items():
        _check_weight(name, weight, tuple(targets[name].shape))
    with torch.no_grad():
        for name, weight in weights.items():
            targets[name].copy_(weight.read())
        if head is not None:
            _check_tied(head, targets["model.embed_tokens.weight"])


def stream_weights(folder: str | Path, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Yields each weight of the checkpoint with its Hugging Face name, in the order of the files.

    A tensor may be a view of a mapped file: copy what you keep, never write to it.
    """
    for name, weight in _weights(Path(folder), config).items():
        yield name, weight.read()


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


def _check_names(
    folder: Path, weights: Mapping[str, _Weight], targets: Mapping[str, Tensor]
) -> None:
    missing = [name for name in targets if name not in weights]
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of the model's {len(targets)} weights: "
            f"{_some(missing)}; "
            "the download is incomplete, or the config is of another model"
        )
    extra = [name for name in weights if name not in targets]
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


def _check_tied(
    head: _Weight,
    embedding: Tensor,  # [vocab, hidden]
) -> None:
    """Accepts the head of a model with tied embeddings if it repeats the embedding."""
    _check_weight("lm_head.weight", head, tuple(embedding.shape))
    rows = 1024  # at a time, so that no second cast copy of the whole matrix is made
    pairs = zip(torch.split(head.read(), rows), torch.split(embedding, rows), strict=True)
    if not all(torch.equal(h.to(e.device, e.dtype), e) for h, e in pairs):
        raise CheckpointError(
            f"{head.file}: the config ties lm_head.weight to the embedding, but they differ; "
            'set "tie_word_embeddings": false in config.json, or remove lm_head.weight'
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
    rows, features = whole.shape
    return whole.view(-1, head_dim // 2, 2, features).transpose(1, 2).reshape(rows, features)


def _dtype_name(dtype: torch.dtype) -> str:
    known = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    return known.get(dtype, str(dtype).removeprefix("torch."))
