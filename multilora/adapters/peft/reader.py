"""A PEFT LoRA folder becomes an Adapter: `adapter_config.json` and `adapter_model.safetensors`.

The config says which modules should be adapted and the header which tensors there are; the two must
agree, exactly, before any weight is read.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ...config.lora_sites import sites_of
from ...errors import AdapterError, AdapterInvalid, shown
from .config import MAX_CONFIG_BYTES, parse_config
from .files import CONFIG_FILE, adapter_folder, open_regular
from .targets import Target, find_targets
from .tensor_names import check_names, pair, rows, sort_names, vectors, wanted_shapes
from .tensors import config_bytes, copy_weights, tensor_header
from .trained import TOKEN_PATHS, ModuleKey, Trained, find_trained, trained_biases
from .weights import MAX_FILE_BYTES, TensorInfo, Weight, read_header, read_weights

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from ...config.model import ModelConfig
    from .config import LoraSpec

WEIGHTS_FILE = "adapter_model.safetensors"
WRITTEN = ("st_size", "st_mtime_ns")  # what a writer changes; not one who puts a new file there
PICKLE_FILE = "adapter_model.bin"


@dataclass(frozen=True, slots=True)
class LoraModule:
    """The LoRA of one linear: it adds `scale * (x A^T) B^T` to the output."""

    a: Tensor  # [rank, in], for the embedding [rank, vocab]; dtype as stored
    b: Tensor  # [out, rank]; dtype as stored
    scale: float  # alpha / r, or alpha / sqrt(r) with rsLoRA, after the patterns
    magnitude: Tensor | None = None  # [out]: DoRA's length of each output column
    bias: Tensor | None = None  # [out], which `scale` multiplies too


@dataclass(frozen=True, slots=True)
class TokenRows:
    """Rows of an embedding or a head, in place of the base's."""

    ids: Tensor  # int64 [rows], tokens, all different
    values: Tensor  # [rows, hidden], dtype as stored


@dataclass(frozen=True, slots=True)
class Adapter:
    """LoRA weights in host memory, checked against the shape of one base model."""

    digest: str  # SHA-256 hex of the content alone: no name, path, key order or file layout in it
    modules: Mapping[ModuleKey, LoraModule]
    rank: int  # largest of any module
    # Whole weights, [vocab, hidden] by site name ("embed", "lm_head"), in place of the base's: of
    # modules_to_save, or what PEFT saved of the base itself. Most rows are often the base's own.
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    biases: Mapping[ModuleKey, Tensor] = field(default_factory=dict)  # [out], for the base's own
    invocation: tuple[int, ...] = ()  # tokens that activate it; () = it is active everywhere
    token_rows: Mapping[str, TokenRows] = field(default_factory=dict)  # by site, as `weights`
    norms: Mapping[int, Tensor] = field(default_factory=dict)  # [hidden], by place in `norm_paths`

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
    folder = adapter_folder(folder)
    with open_regular(folder / CONFIG_FILE, MAX_CONFIG_BYTES) as file:
        spec = parse_config(file.read(MAX_CONFIG_BYTES))
    targets, trained = _find(spec, config, max_rank)
    if os.path.lexists(folder / PICKLE_FILE) and not os.path.lexists(folder / WEIGHTS_FILE):
        raise AdapterInvalid(
            f"{PICKLE_FILE} is refused: pickle is never read, since it can run code; "
            f"convert it to {WEIGHTS_FILE}: multilora adapters convert FOLDER NEW_FOLDER"
        )
    with open_regular(folder / WEIGHTS_FILE, MAX_FILE_BYTES) as file:
        before = os.fstat(file.fileno())
        header = read_header(file)
        plan = _check_header(spec, targets, trained, header, config)
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
    targets, trained = _find(spec, config, max_rank)
    header = tensor_header(tensors)
    plan = _check_header(spec, targets, trained, header, config)
    return _assemble(spec, targets, plan, copy_weights(tensors))


def _find(spec: LoraSpec, config: ModelConfig, max_rank: int) -> tuple[dict[str, Target], Trained]:
    trained = find_trained(spec, config)
    targets = find_targets(
        spec, sites_of(config), max_rank, saved=trained.weights, tied=trained.tie == "all"
    )
    _check_activated(spec, targets, config)
    for site in trained.token_ids:
        if TOKEN_PATHS[site] in targets:
            raise AdapterInvalid(
                f"{TOKEN_PATHS[site]} is refused in target_modules and trainable_token_indices at "
                "once: PEFT has no such adapter"
            )
    return targets, replace(trained, biases=trained_biases(spec, targets, config))


class _Plan(NamedTuple):
    """Which stored tensor is what."""

    names: Mapping[str, str]  # stored name by plain name
    weights: Mapping[str, str]  # stored name by site, of whole embeddings and heads
    trained: Trained


def _check_header(
    spec: LoraSpec,
    targets: Mapping[str, Target],
    trained: Trained,
    header: Mapping[str, TensorInfo],
    config: ModelConfig,
) -> _Plan:
    """Raises AdapterInvalid unless the tensors are those that the config asks for."""
    names, weights = sort_names(header)
    wanted = wanted_shapes(spec, targets, trained, config)
    check_names(names, weights, wanted, trained, config)
    _check_shapes(names, weights, header, wanted, config)
    return _Plan(names, weights, trained)


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


def _check_shapes(
    names: Mapping[str, str],
    weights: Mapping[str, str],
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
    for stored in weights.values():
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
    modules: dict[ModuleKey, LoraModule] = {}
    content: list[object] = ["lora 1"]  # a new reading of old files must change this
    for path, target in sorted(targets.items()):
        a, b = (weights[name] for name in pair(path, target))
        own = {field: weights[name] for field, name in vectors(path, spec).items()}
        modules[target.site.name, target.layer, target.index] = LoraModule(
            a.tensor, b.tensor, target.scale, **{f: v.tensor for f, v in own.items()}
        )
        content.append([path, target.rank, target.scale.hex(), *_identity(a), *_identity(b)])
        content += [[path, field, *_identity(vector)] for field, vector in own.items()]
    trained = plan.trained
    biases = {key: weights[name] for name, (key, _) in trained.biases.items()}
    whole = {s: stored[plan.weights[of]] for s, of in trained.sources(plan.weights).items()}
    norms = {i: weights[f"{path}.weight"] for path, i in trained.norms.items()}
    token_rows = {
        s: (trained.token_ids[of], weights[rows(of)]) for s, of in trained.row_sources().items()
    }
    others = {str(key): weight for key, weight in (*biases.items(), *whole.items())}
    content += [[key, *_identity(weight)] for key, weight in sorted(others.items())]
    content += [["norm", i, *_identity(weight)] for i, weight in sorted(norms.items())]
    content += [["rows", s, *_identity(r), *ids] for s, (ids, r) in sorted(token_rows.items())]
    if spec.invocation:
        content.append(["invocation", *spec.invocation])
    return Adapter(
        hashlib.sha256(json.dumps(content).encode()).hexdigest(),
        modules,
        max(t.rank for t in targets.values()),
        weights={site: weight.tensor for site, weight in whole.items()},
        biases={key: weight.tensor for key, weight in biases.items()},
        invocation=spec.invocation,
        token_rows={
            site: TokenRows(torch.tensor(ids), weight.tensor)
            for site, (ids, weight) in token_rows.items()
        },
        norms={i: weight.tensor for i, weight in norms.items()},
    )


def _identity(weight: Weight) -> tuple[str, str]:
    return str(weight.tensor.dtype), weight.sha256
