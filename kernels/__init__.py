"""Segmented-gather LoRA (SGMV, BGMV), paged attention and what goes with them, as torch ops.

Knows tensors, not adapters, requests or models. The meaning of each op is in `reference`.
"""

from __future__ import annotations

from . import cuda, plans, reference
from .calls import Call, Program, Tape, results_in
from .compilations import Compilations
from .memory import empty_huge
from .native import HAS_CPP
from .ops import (
    apply_token_mask_,
    draw,
    linear,
    lora_,
    lora_embed_,
    lora_expand_,
    lora_head_,
    lora_shrink,
    lora_splits,
    paged_attention,
    rms_norm,
    rope_store_kv_,
    silu_mul,
    top_logprobs,
)
from .packed import (
    PackedWeight,
    pack,
    pack_quantized,
    quantize,
    unpack,
    unpack_rows,
    worth_packing,
)
from .pool import Pool
from .tiles import DECODE_TILE, PREFILL_TILE, Table, Tiles, make_tiles
from .tiles import capacity as tile_capacity

__all__ = [
    "DECODE_TILE",
    "HAS_CPP",
    "PREFILL_TILE",
    "Call",
    "Compilations",
    "PackedWeight",
    "Pool",
    "Program",
    "Table",
    "Tape",
    "Tiles",
    "apply_token_mask_",
    "cuda",
    "draw",
    "empty_huge",
    "linear",
    "lora_",
    "lora_embed_",
    "lora_expand_",
    "lora_head_",
    "lora_shrink",
    "lora_splits",
    "make_tiles",
    "pack",
    "pack_quantized",
    "paged_attention",
    "plans",
    "quantize",
    "reference",
    "results_in",
    "rms_norm",
    "rope_store_kv_",
    "silu_mul",
    "tile_capacity",
    "top_logprobs",
    "unpack",
    "unpack_rows",
    "worth_packing",
]
