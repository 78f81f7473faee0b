"""Adapters that lie in memory: a trainer's config and tensors, as files would have held them."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from ...errors import AdapterInvalid, shown
from .config import MAX_CONFIG_BYTES
from .weights import DTYPES, MAX_FILE_BYTES, MAX_TENSORS, TensorInfo, Weight, check_finite

if TYPE_CHECKING:
    from torch import Tensor


def config_bytes(config: Mapping[str, Any]) -> bytes:
    """The fields of a LoraConfig as `adapter_config.json` has them. AdapterInvalid if it cannot."""
    try:
        # What PEFT keeps for itself and never writes.
        fields = {name: value for name, value in config.items() if name != "runtime_config"}
        data = json.dumps(fields, default=_as_saved).encode()
    except Exception as error:  # a mapping of the caller's
        raise AdapterInvalid(f"the adapter's config is no JSON: {shown(error)}") from error
    if len(data) > MAX_CONFIG_BYTES:
        raise AdapterInvalid(
            f"the adapter's config has {len(data)} bytes; at most {MAX_CONFIG_BYTES} are read"
        )
    return data


def _as_saved(value: object) -> object:
    if isinstance(value, set | frozenset | tuple):
        return sorted(value)
    raise TypeError(f"a value of type {type(value).__name__}")


def tensor_header(tensors: Mapping[str, Tensor]) -> dict[str, TensorInfo]:
    """What a file's header would say of the tensors. AdapterInvalid for what no file could hold."""
    if len(tensors) > MAX_TENSORS:
        raise AdapterInvalid(f"there are more than {MAX_TENSORS} tensors")
    header, end = {}, 0
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise AdapterInvalid(f"{shown(name)} must name a tensor, not {shown(tensor)}")
        if tensor.dtype not in DTYPES.values() or tensor.layout != torch.strided:
            raise AdapterInvalid(
                f"tensor {shown(name)} has dtype {tensor.dtype} and layout {tensor.layout}; give a "
                "dense one of float32, float16 or bfloat16"
            )
        shape = tuple(tensor.shape)
        if not shape or min(shape) < 1:
            raise AdapterInvalid(f"tensor {shown(name)} has the empty shape {list(shape)}")
        start, end = end, end + math.prod(shape) * tensor.dtype.itemsize
        header[name] = TensorInfo(tensor.dtype, shape, start, end)
    if end > MAX_FILE_BYTES:
        raise AdapterInvalid(f"the tensors have {end} bytes, above the limit of {MAX_FILE_BYTES}")
    return header


def copy_weights(tensors: Mapping[str, Tensor]) -> dict[str, Weight]:
    """The tensors with memory of their own on the host; AdapterInvalid if one is not finite."""
    found = {}
    for name, tensor in tensors.items():
        own = tensor.detach().to("cpu", copy=True).contiguous()
        check_finite(name, own)
        content = own.view(-1).view(torch.uint8).numpy().data
        found[name] = Weight(own, hashlib.sha256(content).hexdigest())
    return found
