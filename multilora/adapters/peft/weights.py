"""Reading a safetensors file that someone else wrote: first the header, checked, then the data.

The layout: 8 bytes, the header's length (little-endian); the header, a JSON object from tensor name
to dtype, shape and byte range; the data, whose ranges leave no gap and share no byte.
"""

from __future__ import annotations

import hashlib
import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

import torch

from ...errors import AdapterInvalid, shown
from .files import strict_json

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

MAX_FILE_BYTES = 4 << 30
MAX_HEADER_BYTES = 4 << 20
MAX_TENSORS = 20_000
MAX_DIMENSIONS = 8
_CROWD = f"the safetensors header names more than {MAX_TENSORS} tensors"
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor as the header describes it; `start` and `end` are bytes from the data's begin."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Weight:
    """One tensor, finite, with memory of its own, and the SHA-256 of its bytes."""

    tensor: Tensor
    sha256: str


def read_header(file: BinaryIO) -> dict[str, TensorInfo]:
    """Checks the header against the file's size; leaves the file at the first byte of data."""
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > size - 8:
        raise AdapterInvalid(
            "the safetensors file is cut short: its header is longer than the file"
        )
    if length > MAX_HEADER_BYTES:
        raise AdapterInvalid(
            f"the safetensors header has {length} bytes; at most {MAX_HEADER_BYTES} are read"
        )
    data = file.read(length)
    _check_crowd(data)
    raw = strict_json(data, "the safetensors header")
    metadata = raw.pop("__metadata__", {})
    if not isinstance(metadata, dict) or any(not isinstance(v, str) for v in metadata.values()):
        raise AdapterInvalid("the safetensors header's __metadata__ must map strings to strings")
    if len(raw) > MAX_TENSORS:
        raise AdapterInvalid(_CROWD)
    header = {name: _tensor_info(name, entry) for name, entry in raw.items()}
    _check_ranges(header, size - 8 - length)
    return header


def read_weights(
    file: BinaryIO,
    header: Mapping[str, TensorInfo],
) -> dict[str, Weight]:
    """Reads every tensor once, in file order, into memory of its own.

    Raises AdapterInvalid if the file has become shorter since its header was read, and on a value
    that is NaN or infinite.
    """
    found = {}
    for name, info in sorted(header.items(), key=lambda item: (item[1].start, item[1].end)):
        data = bytearray(info.end - info.start)
        if file.readinto(data) != len(data):  # type: ignore[attr-defined]
            raise AdapterInvalid(
                f"the safetensors file changed while it was read: {shown(name)} is cut"
            )
        tensor = torch.frombuffer(data, dtype=info.dtype).view(info.shape)
        check_finite(name, tensor)
        found[name] = Weight(tensor, hashlib.sha256(data).hexdigest())
    return found


def check_finite(name: str, tensor: Tensor) -> None:
    """Raises AdapterInvalid for a value that is NaN or infinite."""
    # Both ends are NaN if any value is; isfinite().all() takes ten times as long.
    if not all(math.isfinite(end) for end in torch.aminmax(tensor)):
        raise AdapterInvalid(f"tensor {shown(name)} holds NaN or infinite values; train it again")


def _check_crowd(data: bytes) -> None:
    """Raises if the header is too crowded to be parsed: 4 MiB of keys would take 0.7 s, 4 MiB of
    brackets 80 MB. A tensor takes one brace, two brackets and ten quotes; metadata takes the rest.
    """
    for mark, each in ((b"{", 1), (b"[", 2), (b'"', 10)):
        if data.count(mark) > each * MAX_TENSORS + 1000:
            raise AdapterInvalid(_CROWD)


def _tensor_info(name: str, entry: Any) -> TensorInfo:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise AdapterInvalid(
            f"the safetensors header must give {shown(name)} a dtype, a shape and data_offsets"
        )
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise AdapterInvalid(
            f"tensor {shown(name)} has dtype {shown(dtype)}; save it as one of {', '.join(DTYPES)}"
        )
    if not _is_counts(shape, MAX_DIMENSIONS) or not shape or min(shape) < 1:
        raise AdapterInvalid(
            f"tensor {shown(name)} has the impossible or empty shape {shown(shape)}"
        )
    if not _is_counts(offsets, 2) or len(offsets) != 2:
        raise AdapterInvalid(
            f"tensor {shown(name)} has the impossible data_offsets {shown(offsets)}"
        )
    start, end = offsets
    expected = math.prod(shape) * DTYPES[dtype].itemsize
    if end - start != expected:
        raise AdapterInvalid(
            f"tensor {shown(name)} has {end - start} bytes, "
            f"but {dtype} {shown(shape)} needs {expected}"
        )
    return TensorInfo(DTYPES[dtype], tuple(shape), start, end)


def _is_counts(value: object, max_length: int) -> bool:
    """Whether it is a short list of integers that could be sizes or offsets in the file."""
    return (
        isinstance(value, list)
        and len(value) <= max_length
        and all(type(item) is int and 0 <= item <= MAX_FILE_BYTES for item in value)
    )


def _check_ranges(header: Mapping[str, TensorInfo], data_bytes: int) -> None:
    position = 0
    for name, info in sorted(header.items(), key=lambda item: item[1].start):
        if info.start != position or info.end > data_bytes:
            raise AdapterInvalid(
                f"the safetensors file is damaged: {shown(name)} should begin at byte {position} "
                f"of {data_bytes}, but its range is {info.start} to {info.end}"
            )
        position = info.end
    if position != data_bytes:
        raise AdapterInvalid(
            f"the safetensors file is damaged: its tensors take {position} bytes, "
            f"its data has {data_bytes}"
        )
