"""The fused linears of a Llama: which checkpoint modules they are, and how wide."""

from __future__ import annotations

from multilora.config.lora_sites import sites_of
from multilora.config.presets import SHAPES

LLAMA = SHAPES["llama-3.1-8b"]


def test_sites_come_in_the_order_in_which_a_token_meets_them() -> None:
    assert list(sites_of(LLAMA)) == ["embed", "qkv", "o", "gate_up", "down", "lm_head"]


def test_shapes_are_those_of_llama_8b() -> None:
    shapes = {name: (site.in_, site.out, site.layers) for name, site in sites_of(LLAMA).items()}
    assert shapes == {
        "embed": (128_256, 4096, 1),
        "qkv": (4096, 6144, 32),
        "o": (4096, 4096, 32),
        "gate_up": (4096, 28_672, 32),
        "down": (14_336, 4096, 32),
        "lm_head": (4096, 128_256, 1),
    }


def test_slices_lie_one_after_the_other() -> None:
    sites = sites_of(LLAMA)
    assert sites["qkv"].slice_starts == (0, 4096, 5120, 6144)
    assert sites["gate_up"].slice_starts == (0, 14_336, 28_672)
    assert sites["o"].slice_starts == (0, 4096)


def test_a_slice_is_a_module_of_the_checkpoint() -> None:
    sites = sites_of(LLAMA)
    assert sites["qkv"].module_path(3, 1) == "model.layers.3.self_attn.k_proj"
    assert sites["gate_up"].module_path(0, 0) == "model.layers.0.mlp.gate_proj"
    assert sites["down"].module_path(31, 0) == "model.layers.31.mlp.down_proj"
    assert sites["embed"].module_path(0, 0) == "model.embed_tokens"
    assert sites["lm_head"].module_path(0, 0) == "lm_head"
    assert [name for name, site in sites.items() if not site.in_layers] == ["embed", "lm_head"]
