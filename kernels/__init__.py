"""Segmented-gather LoRA (SGMV, BGMV), paged attention and what goes with them, as torch ops.

Knows tensors, not adapters, requests or models. The meaning of each op is in `reference`; the page
with examples is docs/kernels.md. Floating tensors are float32, bfloat16 or float16. Every op raises
ValueError for shapes that disagree, on CUDA also for dtypes and strides that its kernel does not
read, and NotDifferentiable for an argument whose gradient would be wanted. On a CPU those that take
indices look at them first: IndexError for one out of range; a GPU does not look.
"""

from __future__ import annotations

from . import cuda, reference
from .cpu.buffer_pool import BufferPool
from .cpu.graph import (
    Capture,
    KernelCall,
    KernelSequence,
    capture,
    end_captures,
    results_in,
)
from .cpu.huge_pages import empty_huge
from .cpu.native import HAS_CPP
from .cuda.compilations import Compilations
from .ops import (
    NotDifferentiable,
    apply_token_mask_,
    bgmv_,
    draw,
    linear,
    lora_,
    lora_columns_,
    lora_embed_,
    lora_expand_,
    lora_head_,
    lora_shrink,
    lora_splits,
    paged_attention,
    rms_norm,
    rope_store_kv_,
    sgmv_,
    silu_mul,
    top_logprobs,
)
from .packed_lora import LoraWeights, PackedLora, pack_lora, pages_for, write_lora_
from .packed_weight import (
    PackedWeight,
    pack,
    pack_quantized,
    quantize,
    unpack,
    unpack_rows,
    worth_packing,
)
from .tiles import DECODE_TILE, PAGE_ROWS, PREFILL_TILE, Columns, Table, Tiles, make_tiles
from .tiles import capacity as tile_capacity

__all__ = [
    "DECODE_TILE",
    "HAS_CPP",
    "PAGE_ROWS",
    "PREFILL_TILE",
    "BufferPool",
    "Capture",
    "Columns",
    "Compilations",
    "KernelCall",
    "KernelSequence",
    "LoraWeights",
    "NotDifferentiable",
    "PackedLora",
    "PackedWeight",
    "Table",
    "Tiles",
    "apply_token_mask_",
    "bgmv_",
    "capture",
    "cuda",
    "draw",
    "empty_huge",
    "end_captures",
    "linear",
    "lora_",
    "lora_columns_",
    "lora_embed_",
    "lora_expand_",
    "lora_head_",
    "lora_shrink",
    "lora_splits",
    "make_tiles",
    "pack",
    "pack_lora",
    "pack_quantized",
    "paged_attention",
    "pages_for",
    "quantize",
    "reference",
    "results_in",
    "rms_norm",
    "rope_store_kv_",
    "sgmv_",
    "silu_mul",
    "tile_capacity",
    "top_logprobs",
    "unpack",
    "unpack_rows",
    "worth_packing",
    "write_lora_",
]
