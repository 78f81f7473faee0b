"""Rotary frequencies and tables; transformers says what is right."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from multilora.config.model import ModelConfig
from multilora.model.rope import Rope
from tests.harness.model_folders import TINY, hf_config


class Interrupted(BaseException):
    """Raised in the middle of something."""


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


SCALINGS: dict[str, dict[str, Any]] = {
    "plain": {"rope_type": "default"},
    "CodeLlama's old spelling": {"type": "linear", "factor": 4.0},
    "deepseek-coder": {"type": "linear", "factor": 4.0},
    "dynamic, up to what was trained": {"rope_type": "dynamic", "factor": 4.0},
    **{
        f"Llama 3.1, {original}": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": original,
        }
        for original in (16, 256, 8192)
    },
    "YaRN": {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 4096},
    "YaRN, all told": {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 2048,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "mscale": 0.7,
        "mscale_all_dim": 0.9,
        "truncate": False,
    },
    "YaRN, a factor of its own": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 1024,
        "attention_factor": 1.3,
    },
}


@pytest.mark.parametrize("name", SCALINGS)
def test_cos_and_sin_are_those_of_transformers(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    raw = hf_config(replace(TINY, rope_scaling=None, max_position_embeddings=16_384))
    theta = raw.pop("rope_parameters", {}).get("rope_theta", 10_000.0)
    raw |= {"head_dim": 64, "rope_theta": theta, "rope_scaling": SCALINGS[name]}
    ours = Rope(ModelConfig.from_hf(raw))
    theirs = LlamaRotaryEmbedding(transformers.LlamaConfig(**raw))
    positions = torch.tensor([[0, 1, 63, 1000, 5000]])
    wanted = theirs(torch.zeros(1, 5, 64), positions)
    for mine, other in zip(ours.tables(5001), wanted, strict=True):
        expected = other[0, :, :32]  # the second half repeats the first
        torch.testing.assert_close(mine[positions[0]], expected, rtol=0, atol=1e-3)
    torch.testing.assert_close(ours.inv_freq, theirs.inv_freq, rtol=2e-6, atol=0)


def test_a_positions_bits_do_not_depend_on_when_it_was_asked_for() -> None:
    at_once, later = Rope(TINY), Rope(TINY)
    later.tables(3)
    for one, other in zip(at_once.tables(5000), later.tables(5000), strict=True):
        assert torch.equal(one, other)
