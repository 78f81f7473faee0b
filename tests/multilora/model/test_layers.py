"""The parts of a Llama beside its linears."""

from __future__ import annotations

import torch

from multilora.config.lora_sites import sites_of
from multilora.model.forward_batch import ForwardBatch
from multilora.model.kv_cache import KVCache
from multilora.model.layers import Attention, RMSNorm, Rope
from tests.harness.model_folders import TINY


class Interrupted(BaseException):
    """What Ctrl-C is."""


def one_token() -> ForwardBatch:
    none, one = torch.zeros(1, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    return ForwardBatch(none, none, none, none, one, none[None], 1, 1, None, {})


def test_a_norm_adds_into_the_residual_first() -> None:
    norm = RMSNorm(8, 1e-5, torch.float32, 0)
    norm.weight.copy_(torch.rand(8))
    x, residual = torch.randn(2, 3, 8)
    total = x + residual
    wanted = total / (total.square().mean(1, keepdim=True) + 1e-5).sqrt() * norm.weight
    torch.testing.assert_close(norm(x.clone(), residual, one_token()), wanted)
    torch.testing.assert_close(residual, total)


def test_attention_is_torchs_over_the_heads_of_each_group() -> None:
    count, dim, block = 11, TINY.head_dim, 4
    attention = Attention(TINY, sites_of(TINY), 0, torch.float32, {})
    weights = {}
    for linear in (attention.qkv, attention.o):
        part = linear.part()
        weights |= {n: torch.randn(s) / s[1] ** 0.5 for n, s in part.shapes.items()}
        part.load(weights.__getitem__)
    wq, wk, wv, wo = (weights[f"model.layers.0.self_attn.{n}_proj.weight"] for n in "qkvo")
    x, rope, at = torch.randn(count, TINY.hidden_size), Rope(TINY), torch.arange(count)
    batch = ForwardBatch(
        ids=at,
        positions=at,
        kv_slots=at + block,  # blocks 1, 2, 3
        query_starts=torch.tensor([0, count], dtype=torch.int32),
        seq_lens=torch.tensor([count], dtype=torch.int32),
        block_table=torch.tensor([[1, 2, 3]], dtype=torch.int32),
        max_query_len=count,
        max_seq_len=count,
        logits_rows=None,
        lora={},
    )
    found = attention(x, batch, KVCache(TINY, 4, block, torch.float32), rope)

    def rotated(heads: torch.Tensor) -> torch.Tensor:  # [tokens, heads, dim]
        cos, sin = (t[:count, None] for t in rope.tables(count))
        first, second = heads[..., : dim // 2], heads[..., dim // 2 :]
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)

    q, k = (rotated((x @ w.T).view(count, -1, dim)) for w in (wq, wk))
    wanted = torch.nn.functional.scaled_dot_product_attention(
        *(t.transpose(0, 1) for t in (q, k, (x @ wv.T).view(count, -1, dim))),
        is_causal=True,
        enable_gqa=True,
    )
    wanted = wanted.transpose(0, 1).reshape(count, -1) @ wo.T
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
