"""The ops on CUDA devices: which Triton function does what, loaded when first called."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import plans, reference
from .library import implement
from .tiles import Table, Tiles

OLDEST_TRITON = (3, 6)


class TritonMissing(ImportError):
    """A CUDA op was called where triton is not installed, or is too old."""


class NoCudaKernel(NotImplementedError):
    """An op was called with CUDA tensors that only works on CPU."""


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


def check_device(where: torch.device) -> None:
    """Whether the ops run on a CUDA device, before anything is loaded onto it.

    Raises TritonMissing or `plans.UnsupportedDevice`.
    """
    try:
        found = version("triton")
    except PackageNotFoundError:
        found = None
    if found is None or tuple(map(int, found.split(".")[:2])) < OLDEST_TRITON:
        wanted = ".".join(map(str, OLDEST_TRITON))
        raise TritonMissing(
            f"the CUDA ops need triton {wanted} or newer, {'none' if found is None else found} is "
            f"installed: pip install 'triton>={wanted}'"
        )
    plans.device_of(where)


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


def _paged_attention(q: Tensor, *rest: Any) -> Any:
    sm = plans.device_of(q.device).sm
    return triton_module("attention").paged_attention(q, *rest, sm=sm)


def _lora_splits(x: Tensor, a_pages: Tensor) -> int:
    found: int = triton_module("lora").splits(x, a_pages, plans.device_of(x.device))
    return found


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, batch_invariant: bool = False) -> Any:
    """cuBLAS, which is faster, unless a row's bits must not depend on the number of rows."""
    if not batch_invariant:
        return F.linear(x, weight, bias)
    y = triton_module("matmul").matmul(x, weight)
    return y if bias is None else y.add_(bias)


def _linear_packed(*_: Any) -> Any:
    raise NoCudaKernel("packed weights are for CPU: multilora_kernels.unpack gives a plain weight")


def _fused(name: str) -> Callable[..., Any]:
    return lambda *args: getattr(triton_module("fused"), name)(*args)


KERNELS: dict[str, Callable[..., Any]] = {
    "lora_shrink": _lora_shrink,
    "lora_splits": _lora_splits,
    "lora_expand_": _lora_expand_,
    "lora_": _lora_,
    "lora_embed_": _lora_embed_,
    "paged_attention": _paged_attention,
    "linear": _linear,
    "linear_packed": _linear_packed,
    "top_logprobs": reference.top_logprobs,
    "draw": reference.draw,
    **{
        name: _fused(name)
        for name in ("rope_store_kv_", "rms_norm", "silu_mul", "apply_token_mask_")
    },
}
"""What each op does with CUDA tensors. None of it looks where a tensor lies."""


def register() -> None:
    """Tells torch's dispatcher; the ops must be defined."""
    for name, function in KERNELS.items():
        implement(name, "CUDA", function)
