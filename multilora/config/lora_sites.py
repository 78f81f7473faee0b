"""Where LoRA can act: the fused linears of a Llama, and how checkpoint modules map onto them.

A *site* is one kind of fused linear (`qkv`, `o`, `gate_up`, `down`, in every layer), or `embed` or
`lm_head`. Its *slices* are the separate linears that were fused along the output.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .model import ModelConfig


@dataclass(frozen=True, slots=True)
class Slice:
    """One unfused linear inside a site: checkpoint module `module`, `out` output features."""

    module: str  # last path component in a Hugging Face checkpoint, e.g. "q_proj"
    out: int


@dataclass(frozen=True, slots=True)
class Site:
    """One kind of fused linear: `y[tokens, out] = x[tokens, in_] W^T`, in `layers` copies."""

    name: str
    parent: str  # the module that holds it: "self_attn", "mlp", or "" at the top
    slices: tuple[Slice, ...]
    in_: int
    layers: int  # 1 for embed and lm_head

    @property
    def out(self) -> int:
        """Output features of all slices together."""
        return sum(s.out for s in self.slices)

    @property
    def slice_starts(self) -> tuple[int, ...]:
        """Output column where each slice begins, then `out`: length `len(slices) + 1`."""
        starts = [0]
        for s in self.slices:
            starts.append(starts[-1] + s.out)
        return tuple(starts)

    @property
    def in_layers(self) -> bool:
        """Whether the site is repeated in every decoder layer."""
        return self.name not in ("embed", "lm_head")

    def module_path(self, layer: int, index: int) -> str:
        """Checkpoint path of slice `index` in `layer`, e.g. "model.layers.3.self_attn.q_proj"."""
        module = self.slices[index].module
        if self.name == "lm_head":
            return module
        if self.name == "embed":
            return f"model.{module}"
        return f"model.layers.{layer}.{self.parent}.{module}"


def norm_paths(config: ModelConfig) -> list[str]:
    """Checkpoint paths of all norms, in the order in which a token meets them."""
    names = ("input_layernorm", "post_attention_layernorm")
    in_layers = [f"model.layers.{i}.{name}" for i in range(config.num_layers) for name in names]
    return [*in_layers, "model.norm"]


def num_norms(sites: Mapping[str, Site]) -> int:
    """How many norms a Llama with these sites has."""
    return 2 * max(site.layers for site in sites.values()) + 1


def biased_sites(config: ModelConfig) -> tuple[Site, ...]:
    """The sites whose linears have a bias in a Llama of this shape."""
    names = ("qkv", "o") * config.attention_bias + ("gate_up", "down") * config.mlp_bias
    sites = sites_of(config)
    return tuple(sites[name] for name in names)


def sites_of(config: ModelConfig) -> dict[str, Site]:
    """All sites of a Llama of this shape, by name, in the order in which a token meets them."""
    hidden, layers = config.hidden_size, config.num_layers
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    inter = config.intermediate_size
    found = (
        Site("embed", "", (Slice("embed_tokens", hidden),), config.vocab_size, 1),
        Site(
            "qkv",
            "self_attn",
            (Slice("q_proj", q), Slice("k_proj", kv), Slice("v_proj", kv)),
            hidden,
            layers,
        ),
        Site("o", "self_attn", (Slice("o_proj", hidden),), q, layers),
        Site(
            "gate_up", "mlp", (Slice("gate_proj", inter), Slice("up_proj", inter)), hidden, layers
        ),
        Site("down", "mlp", (Slice("down_proj", hidden),), inter, layers),
        Site("lm_head", "", (Slice("lm_head", config.vocab_size),), hidden, 1),
    )
    return {site.name: site for site in found}
