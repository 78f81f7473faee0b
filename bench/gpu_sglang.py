"""SGLang's Triton LoRA kernels, compared in `bench/gpu_kernels.py` where SGLang is importable.

Two of its backends: "triton" (sgemm_lora_a, then qkv_lora_b, gate_up_lora_b or sgemm_lora_b) with a
segment for each adapter, and "csgmv" (chunked_sgmv) with segments of at most 16 rows.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_OPS = "sglang.srt.lora.triton_ops"
CHUNK = 16


def state() -> str:
    """The version, or why it is not compared."""
    try:
        _operator("sgemm_lora_a_fwd")
    except Exception as error:  # whatever a foreign package does when it is imported
        return f"not compared: {type(error).__name__}: {error}"
    return f"sglang {getattr(importlib.import_module('sglang'), '__version__', 'unknown')}"


def ways(
    x: Tensor,  # [rows, in]
    y: Tensor,  # [rows, out]
    slots: list[int],  # of each row, ascending
    ranks: list[int],  # of each adapter
    starts: tuple[int, ...],  # of the slices of y
    weights: list[tuple[Tensor, Tensor]],  # A [adapters, slices, rank, in], B [adapters, rank, out]
) -> dict[str, list[Callable[[], Tensor]]]:
    """By backend one call for each set of weights; empty without SGLang."""
    if not state().startswith("sglang"):
        return {}
    runs = [(slot, len(list(rows))) for slot, rows in itertools.groupby(slots)]
    chunks = [
        (slot, min(CHUNK, count - first))
        for slot, count in runs
        for first in range(0, count, CHUNK)
    ]
    longest = max(count for _, count in runs)
    whole = _batch_info(runs, ranks, x.device, max_len=longest, permutation=None)
    # The chunked kernels always look rows up, and take tiles of max_len rows.
    rows = torch.arange(len(slots), dtype=torch.int32, device=x.device)
    cut = _batch_info(chunks, ranks, x.device, max_len=CHUNK, permutation=rows)
    sets = [(_packed_a(a, ranks), b.transpose(1, 2).contiguous()) for a, b in weights]
    return {
        "sglang": [_by_segment(x, y, starts, whole, a, b) for a, b in sets],
        "sglang csgmv": [_by_chunk(x, y, starts, cut, a, b) for a, b in sets],
    }


def _by_segment(
    x: Tensor, y: Tensor, starts: tuple[int, ...], info: Any, a: Tensor, b: Tensor
) -> Callable[[], Tensor]:
    slices, widths = len(starts) - 1, [last - first for first, last in itertools.pairwise(starts)]
    name = {3: "qkv_lora_b_fwd", 2: "gate_up_lora_b_fwd", 1: "sgemm_lora_b_fwd"}[slices]
    shrink, expand = _operator("sgemm_lora_a_fwd"), _operator(name)
    extra = {
        "output_offset": torch.tensor(starts, dtype=torch.int32, device=x.device),
        "max_qkv_out_dim": max(widths),
        "output_dim": widths[0],
    }

    def call() -> Tensor:
        middle = shrink(x, a, info, slices)
        _call(expand, middle, b, info, base_output=y, **extra)
        return y

    return call


def _by_chunk(
    x: Tensor, y: Tensor, starts: tuple[int, ...], info: Any, a: Tensor, b: Tensor
) -> Callable[[], Tensor]:
    shrink = _operator("chunked_sgmv_lora_shrink_forward")
    expand = _operator("chunked_sgmv_lora_expand_forward")
    offsets = torch.tensor(starts, dtype=torch.int32, device=x.device)
    extra = {
        "slice_offsets": offsets,
        "max_slice_size": max(last - first for first, last in itertools.pairwise(starts)),
    }
    # Later versions count blocks on the host unless told, which no capture allows.
    count = getattr(inspect.getmodule(expand), "compute_slice_block_config", None)
    if count is not None:
        extra["slice_block_config"] = count(offsets)

    def call() -> Tensor:
        middle = shrink(x, a, info, len(starts) - 1)
        _call(expand, middle, b, info, base_output=y, **extra)
        return y

    return call


def _operator(name: str) -> Any:
    return getattr(importlib.import_module(_OPS), name)


def _packed_a(a: Tensor, ranks: Sequence[int]) -> Tensor:
    """[adapters, slices * rank, in]: an adapter's slices lie together at its own rank."""
    packed = a.new_zeros(len(a), a.shape[1] * a.shape[2], a.shape[3])
    for slot, rank in enumerate(ranks):
        packed[slot, : a.shape[1] * rank] = a[slot, :, :rank].flatten(0, 1)
    return packed


def _batch_info(
    segments: list[tuple[int, int]],  # (adapter, rows)
    ranks: list[int],
    device: torch.device,
    **more: Any,
) -> Any:
    """What its kernels want to know of a batch, with those fields that this version has."""
    lens = [rows for _, rows in segments]

    def put(values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    known = {
        "use_cuda_graph": False,
        "bs": len(segments),
        "num_segments": len(segments),
        "seg_indptr": put([0, *itertools.accumulate(lens)]),
        "seg_lens": put(lens),
        "weight_indices": put([slot for slot, _ in segments]),
        "lora_ranks": put(ranks),
        "scalings": torch.ones(len(ranks), device=device),
        **more,
    }
    kind = importlib.import_module("sglang.srt.lora.utils").LoRABatchInfo
    found = {}
    for field in dataclasses.fields(kind):
        missing = dataclasses.MISSING
        if field.name in known:
            found[field.name] = known[field.name]
        elif field.default is missing and field.default_factory is missing:
            found[field.name] = None
    return kind(**found)


def _call(function: Any, *arguments: Any, **options: Any) -> None:
    """Calls it with those of the options that this version of SGLang has."""
    names = inspect.signature(function).parameters
    function(*arguments, **{name: value for name, value in options.items() if name in names})
