"""The parts of a Llama beside its linears."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from multilora.config.lora_sites import sites_of
from multilora.config.model import RopeScaling
from multilora.model.forward_batch import ForwardBatch
from multilora.model.kv_cache import KVCache
from multilora.model.layers import Attention, RMSNorm, Rope
from tests.harness.model_folders import TINY, hf_config


class Interrupted(BaseException):
    """What Ctrl-C is."""


def test_rotary_tables_grow_together_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    rope = Rope(TINY)

    def interrupted(_: torch.Tensor) -> None:
        raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "sin", interrupted)
        with pytest.raises(Interrupted):
            rope.tables(10)
    cos, sin = rope.tables(10)
    assert cos.shape == sin.shape == (Rope.STEP, TINY.head_dim // 2)


@pytest.mark.parametrize("original", [16, 256, 8192])
def test_rotary_frequencies_are_those_of_transformers(original: int) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = RopeScaling(
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=original,
    )
    config = replace(TINY, head_dim=64, rope_theta=500_000.0, rope_scaling=scaling)
    theirs = transformers.LlamaConfig(**hf_config(config))
    wanted, _ = ROPE_INIT_FUNCTIONS["llama3"](theirs, device=torch.device("cpu"))
    torch.testing.assert_close(Rope(config).inv_freq, wanted, rtol=1e-6, atol=0)


def test_a_positions_bits_do_not_depend_on_when_it_was_asked_for() -> None:
    at_once, later = Rope(TINY), Rope(TINY)
    later.tables(3)
    for one, other in zip(at_once.tables(5000), later.tables(5000), strict=True):
        assert torch.equal(one, other)


def test_a_norm_adds_into_the_residual_first() -> None:
    norm = RMSNorm(8, 1e-5, torch.float32)
    norm.weight.copy_(torch.rand(8))
    x, residual = torch.randn(2, 3, 8)
    total = x + residual
    wanted = total / (total.square().mean(1, keepdim=True) + 1e-5).sqrt() * norm.weight
    torch.testing.assert_close(norm(x.clone(), residual), wanted)
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
