"""The tensors of a PEFT file by what they are: which a config asks for, under which names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...config.lora_sites import sites_of
from ...errors import AdapterInvalid, shown
from .trained import TOKEN_PATHS

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from ...config.model import ModelConfig
    from .config import LoraSpec
    from .targets import Target
    from .trained import Trained

PREFIX = "base_model.model."
VELORA = "lora_velora_embed"  # what VeLoRA's backward pass keeps; nothing forward reads it
ROWS = "token_adapter.trainable_tokens_delta"  # a row's new values, whatever PEFT calls them


def sort_names(header: Iterable[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Stored names by (the name without prefix and adapter name), and by site of whole weights."""
    names: dict[str, str] = {}
    weights: dict[str, str] = {}
    paths = {
        f"{path}{ending}": site
        for site, path in TOKEN_PATHS.items()
        for ending in (".base_layer.weight", ".weight")
    }
    for stored in header:
        name = stored.removeprefix(PREFIX)
        if VELORA in name.split("."):
            continue
        if not stored.startswith(PREFIX):
            raise AdapterInvalid(
                f"unexpected tensor {shown(stored)}: PEFT's names begin with {PREFIX!r}"
            )
        found, key = (weights, paths[name]) if name in paths else (names, _plain(name))
        if key in found:
            raise AdapterInvalid(
                f"tensors {shown(found[key])} and {shown(stored)} are one weight; keep one adapter"
            )
        found[key] = stored
    return names, weights


def _plain(name: str) -> str:
    """Drops the name in "q_proj.lora_A.default.weight": it means nothing outside PEFT.

    So does "base_layer", and the "weight" of a magnitude, which some versions of PEFT write.
    """
    if name.endswith(".base_layer.bias"):
        return f"{name.removesuffix('.base_layer.bias')}.bias"
    path, dot, rest = name.rpartition(".lora_")
    words = rest.split(".")
    if words[0] == "magnitude_vector":
        words = words[:1] if len(words) < 3 or words[2:] == ["weight"] else words
    plain = 1 if words[0].startswith("embedding_") else 2
    if dot and len(words) == plain + 1:
        del words[1]
    return f"{path}{dot}{'.'.join(words)}"


def pair(path: str, target: Target) -> tuple[str, str]:
    """Names of A and B of a module."""
    if target.site.name == "embed":
        return f"{path}.lora_embedding_A", f"{path}.lora_embedding_B"
    return f"{path}.lora_A.weight", f"{path}.lora_B.weight"


def vectors(path: str, spec: LoraSpec) -> dict[str, str]:
    """Names of what a module has beside A and B, by the field of LoraModule."""
    found = {}
    if spec.dora:
        found["magnitude"] = f"{path}.lora_magnitude_vector"
    if spec.lora_bias:
        found["bias"] = f"{path}.lora_B.bias"
    return found


def rows(site: str) -> str:
    """Name of the trained rows of the embedding or the head."""
    return f"{TOKEN_PATHS[site]}.{ROWS}"


def wanted_shapes(
    spec: LoraSpec, targets: Mapping[str, Target], trained: Trained, config: ModelConfig
) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor that the config asks for, whole embeddings and heads aside."""
    hidden = config.hidden_size
    found: dict[str, tuple[int, ...]] = {}
    for path, target in targets.items():
        found |= zip(pair(path, target), (target.a_shape, target.b_shape), strict=True)
        found |= dict.fromkeys(vectors(path, spec).values(), target.b_shape[:1])
    found |= {name: (size,) for name, (_, size) in trained.biases.items()}
    found |= {f"{path}.weight": (hidden,) for path in trained.norms}
    return found | {rows(site): (len(ids), hidden) for site, ids in trained.token_ids.items()}


def check_names(
    names: Mapping[str, str],
    weights: Collection[str],  # sites whose whole weight there is
    wanted: Mapping[str, object],
    trained: Trained,
    config: ModelConfig,
) -> None:
    """Raises AdapterInvalid unless the tensors are those that the config asks for, no more."""
    for name, stored in names.items():
        if name not in wanted:
            raise AdapterInvalid(
                f"unexpected tensor {shown(stored)}: {_why_unexpected(name, config)}"
            )
    missing = wanted.keys() - names.keys()
    missing |= {f"{TOKEN_PATHS[site]}.weight" for site in trained.lacking(weights)}
    if missing:
        raise AdapterInvalid(
            f"the config targets modules whose tensors are missing: {_some(missing)}; "
            "was the adapter saved in full, and is this its own config?"
        )


def _why_unexpected(name: str, config: ModelConfig) -> str:
    words = name.split(".")
    if "lora_magnitude_vector" in words:
        return "the config does not say use_dora"
    if words[-2:] == ["lora_B", "bias"]:
        return "the config does not say lora_bias"
    if words[-1] == "bias":
        return "the config's bias says that it was not trained, or the base model has no such bias"
    if name.endswith(ROWS):
        return "the config's trainable_token_indices does not name its module"
    layer = words[2] if words[:2] == ["model", "layers"] and len(words) > 2 else ""
    if layer.isdecimal() and (len(layer) > 9 or int(layer) >= config.num_layers):
        return f"the base model has no layer {layer[:9]}; its last is {config.num_layers - 1}"
    if "norm" in words[-2:][0]:
        return "the config's modules_to_save does not name its module"
    path = name.rpartition(".lora_")[0]
    sites = sites_of(config).values()
    if any(
        path == s.module_path(n, i)
        for s in sites
        for n in range(s.layers)
        for i in range(len(s.slices))
    ):
        return (
            "the config does not target its module in this way "
            "(target_modules, exclude_modules, layers_to_transform)"
        )
    return "the base model has no such module that LoRA can adapt"


def _some(names: Collection[str]) -> str:
    """The first few names, and how many more there are."""
    first = sorted(names)[:3]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(map(shown, first))}{more}"
