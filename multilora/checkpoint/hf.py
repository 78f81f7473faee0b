"""Hugging Face's layout: `model.safetensors`, or shards with an index."""

from __future__ import annotations

import struct
from functools import partial
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..config.model import read_json
from ..errors import CheckpointError
from .parts import CheckpointWeight, is_ignored, some_of

MAX_HEADER_BYTES = 64 << 20  # a header of a 405B model is under 1 MiB


def safetensors_files(folder: Path) -> list[Path]:
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
            f"{some_of(lost)}; download them again"
        )
    return files


def _is_plain_file_name(name: str) -> bool:
    return name.endswith(".safetensors") and not set(name) & set("/\\:\0")


def hf_weights(files: list[Path]) -> dict[str, CheckpointWeight]:
    weights: dict[str, CheckpointWeight] = {}
    for file in files:
        _check_header_size(file)
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.offset_keys():
                    if is_ignored(name):
                        continue
                    if name in weights:
                        raise CheckpointError(f"{name} is in both {weights[name].file} and {file}")
                    view = opened.get_slice(name)
                    read = partial(_read_safetensor, file, name)
                    weights[name] = CheckpointWeight(
                        tuple(view.get_shape()), view.get_dtype(), file, read
                    )
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
