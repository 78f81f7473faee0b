"""The ops on CUDA devices: which Triton function does what, loaded when first called.

None of it looks where a tensor lies, so that all of it runs on a CPU in Triton's interpreter.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..packed_weight import PackedWeight
from ..tiles import Columns, Table, Tiles
from .launch_plans import target_of

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

    Raises TritonMissing or `UnsupportedDevice`.
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
    target_of(where)


# Low-rank deltas ----------------------------------------------------------------------------------


def lora_shrink(x: Tensor, a_pages: Tensor, table: Table, tiles: Tiles, split_k: int) -> Any:
    device = target_of(x.device)
    return triton_module("lora").lora_shrink(x, a_pages, table, tiles, split_k, device)


def lora_splits(x: Tensor, a_pages: Tensor) -> int:
    found: int = triton_module("lora").splits(x, a_pages, target_of(x.device))
    return found


def lora_expand_(
    y: Tensor,
    planes: Tensor,
    b_pages: Tensor,
    table: Table,
    tiles: Tiles,
    slice_starts: Sequence[int],
) -> None:
    device = target_of(y.device)
    triton_module("lora").lora_expand_(y, planes, b_pages, table, tiles, slice_starts, device)


def lora_(
    y: Tensor,
    x: Tensor,
    a_pages: Tensor,
    b_pages: Tensor,
    table: Table,
    tiles: Tiles,
    slice_starts: Sequence[int],
) -> None:
    device = target_of(y.device)
    triton_module("lora").lora_(y, x, a_pages, b_pages, table, tiles, slice_starts, device)


def lora_embed_(
    y: Tensor, ids: Tensor, a_pages: Tensor, b_pages: Tensor, table: Table, tiles: Tiles
) -> None:
    device = target_of(y.device)
    triton_module("lora").lora_embed_(y, ids, a_pages, b_pages, table, tiles, device)


def lora_columns_(y: Tensor, x: Tensor, changes: Columns, tiles: Tiles) -> None:
    triton_module("lora_columns").lora_columns_(y, x, changes, tiles)


# Attention ----------------------------------------------------------------------------------------


def paged_attention(
    q: Tensor,
    k_blocks: Tensor,
    v_blocks: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_starts: Tensor,
    scale: float,
    max_query_len: int,
    max_seq_len: int,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    batch_invariant: bool = False,
) -> Any:
    return triton_module("attention").paged_attention(
        q, k_blocks, v_blocks, block_table, seq_lens, query_starts, scale,
        max_query_len, max_seq_len, k_scale, v_scale, batch_invariant,
        sm=target_of(q.device).sm,
    )  # fmt: skip


# Linears ------------------------------------------------------------------------------------------


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, batch_invariant: bool = False) -> Any:
    """cuBLAS, which is faster, unless a row's bits must not depend on the number of rows."""
    if not batch_invariant:
        return F.linear(x, weight, bias)
    y = triton_module("linear").matmul(x, weight)
    return y if bias is None else y.add_(bias)


def linear_packed(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Any:
    raise NoCudaKernel("packed weights are for CPU: multilora_kernels.unpack gives a plain weight")


# Elementwise --------------------------------------------------------------------------------------


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    change: Tensor | None = None,
    change_row: Tensor | None = None,
) -> Any:
    return triton_module("elementwise").rms_norm(x, weight, eps, None, change, change_row)


def add_rms_norm_(
    residual: Tensor,
    x: Tensor,
    weight: Tensor,
    eps: float,
    change: Tensor | None = None,
    change_row: Tensor | None = None,
) -> Any:
    return triton_module("elementwise").rms_norm(x, weight, eps, residual, change, change_row)


def silu_mul(x: Tensor) -> Any:
    return triton_module("elementwise").silu_mul(x)


def rope_store_kv_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    kv_slots: Tensor,
    k_blocks: Tensor,
    v_blocks: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    triton_module("elementwise").rope_store_kv_(
        q, k, v, cos, sin, positions, kv_slots, k_blocks, v_blocks, k_scale, v_scale
    )


# Sampling -----------------------------------------------------------------------------------------


def apply_token_mask_(logits: Tensor, mask: Tensor) -> None:
    triton_module("sampling").apply_token_mask_(logits, mask)


top_logprobs = reference.top_logprobs  # torch's own sort; it never looks at a value on the host
draw = reference.draw
