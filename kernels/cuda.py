"""The ops on CUDA devices: which Triton function does what, loaded when first called."""

from __future__ import annotations

import importlib
from typing import Any

from torch import Tensor

from . import plans
from .library import implement
from .tiles import Table, Tiles


class TritonMissing(ImportError):
    """A CUDA op was called where triton is not installed."""


def triton_module(name: str) -> Any:
    """The module `name` of this package, which imports triton."""
    try:
        return importlib.import_module(f".{name}", __package__)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "triton":
            raise
        raise TritonMissing(
            "the CUDA ops need triton: pip install 'multilora[gpu]', or keep the tensors on the CPU"
        ) from error


def _lora_shrink(x: Tensor, a_pages: Tensor, *rest: Any) -> Any:
    table, tiles = Table(*rest[:6]), Tiles(*rest[6:10])
    device = plans.device_of(x.device)
    return triton_module("lora").lora_shrink(x, a_pages, table, tiles, rest[10], device)


def _lora_expand_(y: Tensor, planes: Tensor, b_pages: Tensor, *rest: Any) -> None:
    table, tiles = Table(*rest[:6]), Tiles(*rest[6:10])
    device = plans.device_of(y.device)
    triton_module("lora").lora_expand_(y, planes, b_pages, table, tiles, rest[10], device)


def _lora_(y: Tensor, x: Tensor, a_pages: Tensor, b_pages: Tensor, *rest: Any) -> None:
    table, tiles = Table(*rest[:6]), Tiles(*rest[6:10])
    device = plans.device_of(y.device)
    triton_module("lora").lora_(y, x, a_pages, b_pages, table, tiles, rest[10], device)


def _lora_embed_(y: Tensor, ids: Tensor, a_pages: Tensor, b_pages: Tensor, *rest: Any) -> None:
    table, tiles = Table(*rest[:6]), Tiles(*rest[6:10])
    device = plans.device_of(y.device)
    triton_module("lora").lora_embed_(y, ids, a_pages, b_pages, table, tiles, device)


def register() -> None:
    """Tells torch's dispatcher; the ops must be defined."""
    implement("lora_shrink", "CUDA", _lora_shrink)
    implement("lora_expand_", "CUDA", _lora_expand_)
    implement("lora_", "CUDA", _lora_)
    implement("lora_embed_", "CUDA", _lora_embed_)
