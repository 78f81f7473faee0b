"""The public ops: their schemas and checks, and their shapes for `torch.compile`.

Each file has the ops of one family, which has the same name in `cpu`, `cuda`, csrc/ and the tests.
torch's dispatcher chooses the device. `punica` has other names for `lora_`.
"""

from .arguments import NotDifferentiable
from .attention import paged_attention
from .elementwise import rms_norm, rope_store_kv_, silu_mul
from .linear import linear
from .lora import (
    lora_,
    lora_columns_,
    lora_embed_,
    lora_expand_,
    lora_head_,
    lora_shrink,
    lora_splits,
)
from .punica import bgmv_, sgmv_
from .sampling import apply_token_mask_, draw, top_logprobs

__all__ = [
    "NotDifferentiable",
    "apply_token_mask_",
    "bgmv_",
    "draw",
    "linear",
    "lora_",
    "lora_columns_",
    "lora_embed_",
    "lora_expand_",
    "lora_head_",
    "lora_shrink",
    "lora_splits",
    "paged_attention",
    "rms_norm",
    "rope_store_kv_",
    "sgmv_",
    "silu_mul",
    "top_logprobs",
]
