"""What an adapter trained beside its LoRA: biases, norms, an embedding or a head, rows of these.

PEFT's rules: `modules_to_save` names modules by how their path ends, letter by letter, and is
stronger than `target_modules`; `trainable_token_indices` names modules in the same way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...config.lora_sites import biased_sites, norm_paths, sites_of
from ...errors import AdapterInvalid, shown

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    from ...config.model import ModelConfig
    from .config import LoraSpec

TOKEN_PATHS = {"embed": "model.embed_tokens", "lm_head": "lm_head"}
"""The sites whose weight has a row for each token, and their paths."""

ModuleKey = tuple[str, int, int]  # (site name, layer, slice index)


@dataclass(frozen=True, slots=True)
class Trained:
    """What one config says, for one base."""

    biases: Mapping[str, tuple[ModuleKey, int]]  # of the base, by name: module and size
    norms: Mapping[str, int]  # by path, the place among `norm_paths`
    weights: frozenset[str]  # sites whose whole weight is saved
    token_ids: Mapping[str, tuple[int, ...]]  # rows that are saved, by site
    tie: str  # the base's head and embedding are: "not" tied, "base" is, or "all" that is trained

    def lacking(self, weights: Collection[str]) -> set[str]:
        """Of the sites whose weight must be saved, those that are not among `weights`."""
        lacking = set(self.weights.difference(weights))
        return set() if self.tie == "all" and len(lacking) < len(self.weights) else lacking

    def sources(self, weights: Collection[str]) -> dict[str, str]:
        """Of the sites whose weight changes: the one whose saved weight, among `weights`, it takes.

        A weight that is saved but not in `modules_to_save` is the base's own, which the head and
        the embedding may share.
        """
        found = {site: site for site in weights}
        for site, other in (("embed", "lm_head"), ("lm_head", "embed")):
            own = self.tie == "all" or (self.tie == "base" and self.weights.isdisjoint(TOKEN_PATHS))
            if own and other in weights:
                found.setdefault(site, other)
        return found

    def row_sources(self) -> dict[str, str]:
        """Of the sites with trained rows: the one whose saved rows it takes."""
        found = {site: site for site in self.token_ids}
        if self.tie != "not" and "embed" in found:
            found.setdefault("lm_head", "embed")
        return found


def find_trained(spec: LoraSpec, config: ModelConfig) -> Trained:
    """What `spec` says of a Llama of this shape. AdapterInvalid for what cannot be served."""
    norms = {path: i for i, path in enumerate(norm_paths(config)) if path.endswith(spec.saved)}
    weights = frozenset(site for site, path in TOKEN_PATHS.items() if path.endswith(spec.saved))
    for path in _other_paths(config):
        if path.endswith(spec.saved):
            name = next(name for name in spec.saved if path.endswith(name))
            raise AdapterInvalid(
                f"modules_to_save={shown(name)} names {path}: norms, "
                "embed_tokens and lm_head alone may be trained in full; target it with LoRA, or "
                "merge the adapter into its base and serve that as a base model"
            )
    tie = "not" if not config.tie_word_embeddings else "all" if spec.tying else "base"
    if tie == "all" and weights:
        weights = frozenset(TOKEN_PATHS)
    token_ids = _token_ids(spec, config, tie)
    if both := weights.intersection(token_ids):
        raise AdapterInvalid(
            f"{TOKEN_PATHS[min(both)]} is refused in modules_to_save and trainable_token_indices "
            "at once: PEFT has no such adapter"
        )
    if tie != "not" and token_ids and weights:
        raise AdapterInvalid(
            "modules_to_save and trainable_token_indices are refused for one tied weight; name "
            "one of them"
        )
    return Trained({}, norms, weights, token_ids, tie)


def trained_biases(
    spec: LoraSpec, targets: Collection[str], config: ModelConfig
) -> dict[str, tuple[ModuleKey, int]]:
    """Of the base's biases those that were trained: name -> (module, size)."""
    return {
        f"{path}.bias": ((site.name, layer, index), piece.out)
        for site in biased_sites(config)
        for layer in range(site.layers)
        for index, piece in enumerate(site.slices)
        for path in (site.module_path(layer, index),)
        if spec.bias == "all" or (spec.bias == "lora_only" and path in targets)
    }


def _token_ids(spec: LoraSpec, config: ModelConfig, tie: str) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for name, ids in spec.token_ids.items():
        sites = [site for site, path in TOKEN_PATHS.items() if path.endswith(name)]
        if not sites:
            raise AdapterInvalid(
                f"trainable_token_indices names {shown(name)}; embed_tokens and lm_head have rows "
                "for tokens"
            )
        for site in sites:
            found[site] = ids
    for ids in found.values():
        if ids and max(ids) >= config.vocab_size:
            raise AdapterInvalid(
                f"trainable_token_indices has {shown(max(ids))}, which is not a token id of the "
                f"base (0..{config.vocab_size - 1})"
            )
    if tie != "not" and "embed" in found and found.get("lm_head") == found["embed"]:
        del found["lm_head"]  # one weight, of which PEFT saves the rows once
    return {site: ids for site, ids in found.items() if ids}


def _other_paths(config: ModelConfig) -> Iterator[str]:
    """The modules with parameters that cannot be trained in full: linears, and what holds some."""
    yield from ("model", "model.layers")
    for layer in range(config.num_layers):
        path = f"model.layers.{layer}"
        yield from (path, f"{path}.self_attn", f"{path}.mlp")
    for site in sites_of(config).values():
        if site.in_layers:
            for layer in range(site.layers):
                yield from (site.module_path(layer, i) for i in range(len(site.slices)))
