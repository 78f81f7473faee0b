"""vLLM's Triton LoRA kernels, compared in `bench/gpu_kernels.py` where vLLM is importable."""

from __future__ import annotations

import importlib
import inspect
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_FOLDER = "vllm.lora.ops.triton_ops"


def state() -> str:
    """The version, or why it is not compared."""
    try:
        _operators()
    except Exception as error:  # whatever a foreign package does when it is imported
        return f"not compared: {type(error).__name__}: {error}"
    return f"vllm {importlib.import_module('vllm').__version__}"


def ways(
    x: Tensor,  # [rows, in]
    y: Tensor,  # [rows, out]
    slots: list[int],  # of each row, ascending
    starts: tuple[int, ...],  # of the slices of y
    weights: list[tuple[Tensor, Tensor]],  # A [adapters, slices, rank, in], B [adapters, rank, out]
) -> list[Callable[[], Tensor]] | None:
    """One call for each set of weights, or None without vLLM."""
    if not state().startswith("vllm"):
        return None
    shrink, expand = _operators()
    meta = _meta(slots, x.device)
    slices = len(starts) - 1

    def one(a: Tensor, b: Tensor) -> Callable[[], Tensor]:
        a_list = [a[:, s].contiguous() for s in range(slices)]
        b_list = [
            b[:, :, first:last].transpose(1, 2).contiguous()
            for first, last in itertools.pairwise(starts)
        ]
        middle = torch.zeros(slices, len(x), a.shape[2], dtype=torch.float32, device=x.device)

        def call() -> Tensor:
            _call(shrink, meta, inputs=x, lora_a_weights=a_list, output_tensor=middle, scaling=1.0)
            _call(
                expand,
                meta,
                inputs=middle,
                lora_b_weights=b_list,
                output_tensor=y,
                offset_start=0,
                add_inputs=True,
            )
            return y

        return call

    return [one(a, b) for a, b in weights]


def _operators() -> tuple[Any, Any]:
    shrink = importlib.import_module(f"{_FOLDER}.lora_shrink_op")._lora_shrink
    return shrink, importlib.import_module(f"{_FOLDER}.lora_expand_op")._lora_expand


def _meta(slots: list[int], device: torch.device) -> dict[str, Tensor]:
    """What its kernels want to know of a batch: rows by adapter, adapters padded with -1."""
    ids = sorted(set(slots))
    counts = [slots.count(i) for i in ids]

    def put(values: list[int], size: int, fill: int) -> Tensor:
        padded = values + [fill] * (size - len(values))
        return torch.tensor(padded, dtype=torch.int32, device=device)

    size = len(ids) + 1
    return {
        "token_lora_mapping": put(slots, len(slots), 0),
        "token_indices_sorted_by_lora_ids": put(list(range(len(slots))), len(slots), 0),
        "num_tokens_per_lora": put(counts, size, 0),
        "lora_token_start_loc": put([0, *itertools.accumulate(counts)], size + 1, 0),
        "lora_ids": put(ids, size, -1),
        "no_lora_flag_cpu": torch.tensor([False]),
        "num_active_loras": torch.tensor([len(ids)], dtype=torch.int32),
    }


def _call(function: Any, meta: dict[str, Tensor], **arguments: Any) -> None:
    """Calls it with those of the arguments that this version of vLLM has."""
    known = inspect.signature(function).parameters
    function(**{name: value for name, value in {**meta, **arguments}.items() if name in known})
