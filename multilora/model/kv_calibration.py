"""The scales of quantised KV blocks: one for each layer and KV head, measured once at start-up.

The base reads fixed random tokens, and a scale is such that the largest key (after RoPE) or value
seen, with room to spare, is the largest number that a page holds. So scales depend on the base
alone: not on requests, their order or their adapters, and a token's stored bits on that token's
context only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .forward_batch import ForwardBatch
from .kv_cache import KVCache, KVScales

if TYPE_CHECKING:
    from torch import Tensor

    from .llama import Llama

TOKENS = 512
MARGIN = 2.0  # room for other texts and for adapters: docs/quantization.md has what it costs


@torch.inference_mode()
def calibrate(model: Llama, max_len: int, dtype: torch.dtype) -> KVScales:
    """The scales of blocks of `dtype`, on the model's device, from at most `max_len` tokens."""
    config, device = model.config, model.norm.weight.device
    count = max(min(TOKENS, max_len) // 16, 1) * 16  # whole rows: see ForwardBatch
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (count,), generator=generator)
    if config.bos_token_id is not None:
        ids[0] = config.bos_token_id

    def index(values: list[int], kind: torch.dtype = torch.int32) -> Tensor:
        return torch.tensor(values, dtype=kind, device=device)

    cache = KVCache(config, 1, count, model.dtype, device)  # one block of all tokens
    batch = ForwardBatch(
        ids=ids.to(device),
        positions=torch.arange(count, device=device),
        kv_slots=torch.arange(count, device=device),
        query_starts=index([0, count]),
        seq_lens=index([count]),
        block_table=index([0])[None],
        max_query_len=count,
        max_seq_len=count,
        logits_rows=index([0] * 16, torch.int64),
        lora={},
    )
    model(batch, cache)
    largest = 127.0 if dtype == torch.int8 else torch.finfo(dtype).max
    return KVScales(*(_scale(blocks, largest) for blocks in (cache.k, cache.v)))


def _scale(blocks: Tensor, largest: float) -> Tensor:
    """fp32 [layers, kv_heads] of blocks [layers, blocks, block_size, kv_heads, head_dim]."""
    seen = blocks.abs().amax((1, 2, 4)).float()
    # A head that is zero on all tokens still needs a scale to divide by.
    return (seen * (MARGIN / largest)).clamp(min=1e-6)
