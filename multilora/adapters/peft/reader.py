"""A PEFT LoRA folder becomes an Adapter: `adapter_config.json` and `adapter_model.safetensors`.

The config says which modules should be adapted and the header which tensors there are; the two must
agree, exactly, before any weight is read.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ...config.lora_sites import biased_sites, sites_of
from ...errors import AdapterError, AdapterInvalid, shown
from .config import MAX_CONFIG_BYTES, parse_config
from .files import open_regular
from .targets import Target, find_targets
from .tensors import config_bytes, copy_weights, tensor_header
from .weights import MAX_FILE_BYTES, TensorInfo, Weight, read_header, read_weights

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from torch import Tensor

    from ...config.model import ModelConfig
    from .config import LoraSpec

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
WRITTEN = ("st_size", "st_mtime_ns")  # what a writer changes; not one who puts a new file there
PICKLE_FILE = "adapter_model.bin"
PREFIX = "base_model.model."
VELORA = "lora_velora_embed"  # what VeLoRA's backward pass keeps; nothing forward reads it
BASE_SITES = ("embed", "lm_head")  # PEFT saves their full weight beside a LoRA on them

ModuleKey = tuple[str, int, int]  # (site name, layer, slice index)


@dataclass(frozen=True, slots=True)
class LoraModule:
    """The LoRA of one linear: it adds `scale * (x A^T) B^T` to the output."""

    a: Tensor  # [rank, in], for the embedding [rank, vocab]; dtype as stored
    b: Tensor  # [out, rank]; dtype as stored
    scale: float  # alpha / r, or alpha / sqrt(r) with rsLoRA, after the patterns
    magnitude: Tensor | None = None  # [out]: DoRA's length of each output column
    bias: Tensor | None = None  # [out], which `scale` multiplies too


@dataclass(frozen=True, slots=True)
class Adapter:
    """LoRA weights in host memory, checked against the shape of one base model."""

    digest: str  # SHA-256 hex of the content alone: no name, path, key order or file layout in it
    modules: Mapping[ModuleKey, LoraModule]
    rank: int  # largest of any module
    # What PEFT saved of the base itself, [vocab, hidden] by site name ("embed", "lm_head"). Who has
    # the base must find its own weight equal, or refuse the adapter: it was trained on another one.
    base_weights: Mapping[str, Tensor] = field(default_factory=dict)
    biases: Mapping[ModuleKey, Tensor] = field(default_factory=dict)  # [out], for the base's own
    invocation: tuple[int, ...] = ()  # tokens that activate it; () = it is active everywhere

    def rank_at(self, site: str) -> int:
        """Largest rank over the layers and slices of a site; 0 = the site is not adapted."""
        return max((m.a.shape[0] for key, m in self.modules.items() if key[0] == site), default=0)


def read_adapter(folder: str | Path, config: ModelConfig, *, max_rank: int = 512) -> Adapter:
    """Reads a PEFT LoRA folder for a base model of shape `config`.

    Raises AdapterInvalid when a file is missing, unreadable or malformed, does not fit the model,
    or uses a feature that is not supported; AdapterTooLarge when a rank is above `max_rank`.
    """
    try:
        return _read(Path(folder), config, max_rank)
    except AdapterError as error:
        raise type(error)(f"adapter at {shown(str(folder))}: {error}") from error
    except OSError as error:  # the disk, the network, or a file that is none
        why = error.strerror or error
        raise AdapterInvalid(f"adapter at {shown(str(folder))} cannot be read: {why}") from error


def _read(folder: Path, config: ModelConfig, max_rank: int) -> Adapter:
    if not os.path.isdir(folder):
        raise AdapterInvalid(f"there is no such folder; give the one that holds {CONFIG_FILE}")
    with open_regular(folder / CONFIG_FILE, MAX_CONFIG_BYTES) as file:
        spec = parse_config(file.read(MAX_CONFIG_BYTES))
    targets = _targets(spec, config, max_rank)
    if os.path.lexists(folder / PICKLE_FILE) and not os.path.lexists(folder / WEIGHTS_FILE):
        raise AdapterInvalid(
            f"{PICKLE_FILE} is refused: pickle is never read, since it can run code; "
            f"convert it to {WEIGHTS_FILE}: multilora adapters convert FOLDER NEW_FOLDER"
        )
    with open_regular(folder / WEIGHTS_FILE, MAX_FILE_BYTES) as file:
        before = os.fstat(file.fileno())
        header = read_header(file)
        plan = _check_header(spec, targets, header, config)
        weights = read_weights(file, header)
        after = os.fstat(file.fileno())
    if any(getattr(before, name) != getattr(after, name) for name in WRITTEN):
        raise AdapterInvalid(
            f"{WEIGHTS_FILE} was written to while it was read; write to another name and rename"
        )
    return _assemble(spec, targets, plan, weights)


def adapter_from_tensors(
    adapter_config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    config: ModelConfig,
    *,
    max_rank: int = 512,
) -> Adapter:
    """The adapter that PEFT's `save_pretrained` would have written of these, for `config`'s base.

    `adapter_config` are the fields of a LoraConfig (its `to_dict()`), `tensors` what PEFT's
    `get_peft_model_state_dict` gives, on any device; they are copied. Raises like `read_adapter`.
    """
    spec = parse_config(config_bytes(adapter_config))
    targets = _targets(spec, config, max_rank)
    header = tensor_header(tensors)
    plan = _check_header(spec, targets, header, config)
    return _assemble(spec, targets, plan, copy_weights(tensors))


def _targets(spec: LoraSpec, config: ModelConfig, max_rank: int) -> dict[str, Target]:
    targets = find_targets(spec, sites_of(config), max_rank)
    _check_activated(spec, targets, config)
    return targets


class _Plan(NamedTuple):
    """Which stored tensor is what."""

    names: Mapping[str, str]  # stored name by plain name
    base_names: Mapping[str, str]  # stored name by site, of what the base has too
    biases: Mapping[str, tuple[ModuleKey, int]]  # module and size by plain name


def _check_header(
    spec: LoraSpec,
    targets: Mapping[str, Target],
    header: Mapping[str, TensorInfo],
    config: ModelConfig,
) -> _Plan:
    """Raises AdapterInvalid unless the tensors are those that the config asks for."""
    names, base_names = _sort_names(header)
    biases = _biases(spec, targets, config)
    wanted = _wanted(spec, targets, biases)
    _check_names(names, wanted, config)
    _check_shapes(names, base_names, header, wanted, config)
    return _Plan(names, base_names, biases)


def _check_activated(spec: LoraSpec, targets: Mapping[str, Target], config: ModelConfig) -> None:
    """Raises AdapterInvalid for an activated LoRA that no prompt could mean."""
    if not spec.invocation:
        return
    if any(target.site.name == "embed" for target in targets.values()):
        raise AdapterInvalid(
            "alora_invocation_tokens is refused with embed_tokens as a target: PEFT has no such "
            "adapter"
        )
    if (last := max(spec.invocation)) >= config.vocab_size:
        raise AdapterInvalid(
            f"alora_invocation_tokens has {shown(last)}, which is not a token id of the base "
            f"(0..{config.vocab_size - 1})"
        )


def _sort_names(header: Iterable[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Stored names by (the name without prefix and adapter name), and by site for base weights."""
    names: dict[str, str] = {}
    base_names: dict[str, str] = {}
    base_paths = {
        f"{path}{ending}": site
        for path, site in zip(("model.embed_tokens", "lm_head"), BASE_SITES, strict=True)
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
        if name in base_paths:
            found, key = base_names, base_paths[name]
        else:
            found, key = names, _plain(name)
        if key in found:
            raise AdapterInvalid(
                f"tensors {shown(found[key])} and {shown(stored)} are one weight; keep one adapter"
            )
        found[key] = stored
    return names, base_names


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


def _pair(path: str, target: Target) -> tuple[str, str]:
    """Names of A and B of a module."""
    if target.site.name == "embed":
        return f"{path}.lora_embedding_A", f"{path}.lora_embedding_B"
    return f"{path}.lora_A.weight", f"{path}.lora_B.weight"


def _vectors(path: str, spec: LoraSpec) -> dict[str, str]:
    """Names of what a module has beside A and B, by the field of LoraModule."""
    found = {}
    if spec.dora:
        found["magnitude"] = f"{path}.lora_magnitude_vector"
    if spec.lora_bias:
        found["bias"] = f"{path}.lora_B.bias"
    return found


def _biases(
    spec: LoraSpec, targets: Mapping[str, Target], config: ModelConfig
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


def _wanted(
    spec: LoraSpec,
    targets: Mapping[str, Target],
    biases: Mapping[str, tuple[ModuleKey, int]],  # of the base
) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor that the config asks for."""
    found: dict[str, tuple[int, ...]] = {}
    for path, target in targets.items():
        found |= zip(_pair(path, target), (target.a_shape, target.b_shape), strict=True)
        found |= dict.fromkeys(_vectors(path, spec).values(), target.b_shape[:1])
    return found | {name: (size,) for name, (_, size) in biases.items()}


def _check_names(
    names: Mapping[str, str], wanted: Mapping[str, object], config: ModelConfig
) -> None:
    """Raises AdapterInvalid unless the tensors are those that the config asks for, no more."""
    for name, stored in names.items():
        if name not in wanted:
            raise AdapterInvalid(
                f"unexpected tensor {shown(stored)}: {_why_unexpected(name, config)}"
            )
    missing = wanted.keys() - names.keys()
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
    layer = words[2] if words[:2] == ["model", "layers"] and len(words) > 2 else ""
    if layer.isdecimal() and (len(layer) > 9 or int(layer) >= config.num_layers):
        return f"the base model has no layer {layer[:9]}; its last is {config.num_layers - 1}"
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


def _check_shapes(
    names: Mapping[str, str],
    base_names: Mapping[str, str],
    header: Mapping[str, TensorInfo],
    wanted: Mapping[str, tuple[int, ...]],
    config: ModelConfig,
) -> None:
    for name, shape in wanted.items():
        found = header[names[name]].shape
        if found != shape:
            raise AdapterInvalid(
                f"tensor {shown(names[name])} has shape {list(found)}, but the base model and "
                f"the config (r, rank_pattern) need {list(shape)}"
            )
    for stored in base_names.values():
        shape, found = (config.vocab_size, config.hidden_size), header[stored].shape
        if found != shape:
            raise AdapterInvalid(
                f"tensor {shown(stored)} has shape {list(found)}, but the base model's is "
                f"{list(shape)}: it was trained with a resized vocabulary; "
                "merge it into its base and serve that"
            )


def _assemble(
    spec: LoraSpec,
    targets: Mapping[str, Target],
    plan: _Plan,
    stored: Mapping[str, Weight],  # by stored name
) -> Adapter:
    weights = {name: stored[found] for name, found in plan.names.items()}
    base_weights = {site: stored[found] for site, found in plan.base_names.items()}
    biases = {key: weights[name] for name, (key, _) in plan.biases.items()}
    modules: dict[ModuleKey, LoraModule] = {}
    content: list[object] = ["lora 1"]  # a new reading of old files must change this
    for path, target in sorted(targets.items()):
        a, b = (weights[name] for name in _pair(path, target))
        vectors = {field: weights[name] for field, name in _vectors(path, spec).items()}
        modules[target.site.name, target.layer, target.index] = LoraModule(
            a.tensor, b.tensor, target.scale, **{f: v.tensor for f, v in vectors.items()}
        )
        content.append([path, target.rank, target.scale.hex(), *_identity(a), *_identity(b)])
        content += [[path, field, *_identity(vector)] for field, vector in vectors.items()]
    others = {str(key): weight for key, weight in (*biases.items(), *base_weights.items())}
    content += [[key, *_identity(weight)] for key, weight in sorted(others.items())]
    if spec.invocation:
        content.append(["invocation", *spec.invocation])
    return Adapter(
        hashlib.sha256(json.dumps(content).encode()).hexdigest(),
        modules,
        max(t.rank for t in targets.values()),
        {site: weight.tensor for site, weight in base_weights.items()},
        {key: weight.tensor for key, weight in biases.items()},
        spec.invocation,
    )


def _identity(weight: Weight) -> tuple[str, str]:
    return str(weight.tensor.dtype), weight.sha256


def _some(names: Collection[str]) -> str:
    """The first few names, and how many more there are."""
    first = sorted(names)[:3]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(map(shown, first))}{more}"
