"""PEFT's `adapter_config.json`: every field is honoured, known to be harmless, or refused by name.

The three tables below are the decision on each field of PEFT's LoraConfig and of its bases; a test
walks over the fields of the installed PEFT and fails on one without a decision. A field that is in
no table is refused too, unless it is null, false or empty.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from ...errors import AdapterInvalid, shown
from .files import strict_json

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sized

MAX_CONFIG_BYTES = 1 << 20
MAX_NAMES = 8192
LLAMA_TARGETS = ("q_proj", "v_proj")  # PEFT's own choice for a Llama when target_modules is null

MAX_SAVED = 512  # modules_to_save: each is compared with every module of the base
MAX_INVOCATION = 512  # tokens: a phrase, which is looked for in every prompt

BIASES = ("none", "all", "lora_only")

V = TypeVar("V")

HONOURED: Mapping[str, str] = {
    "peft_type": "must be LORA",
    "r": "rank of every module that rank_pattern does not name",
    "lora_alpha": "scale = alpha / r, for every module that alpha_pattern does not name",
    "use_rslora": "scale = alpha / sqrt(r)",
    "rank_pattern": "first key that matches the end of a module's path gives its rank",
    "alpha_pattern": "the same for alpha",
    "target_modules": "path endings, a regular expression for the whole path, or all-linear",
    "exclude_modules": "path endings or a regular expression; stronger than target_modules",
    "layers_to_transform": "layers in which target_modules counts",
    "layers_pattern": "name before the layer number in a module's path",
    "use_dora": "each output column is rescaled to a trained length; not with lora_bias",
    "lora_bias": "a bias on lora_B, times the scale of its module",
    "bias": "all or lora_only: trained biases in place of the base's, where it has any",
    "modules_to_save": "norms, embed_tokens and lm_head trained in full; stronger than a target",
    "trainable_token_indices": "rows of embed_tokens and lm_head that were trained",
    "ensure_weight_tying": "what is trained of a tied embedding or head is trained of both",
    "alora_invocation_tokens": "active from the last place in the prompt that has these tokens",
}

HARMLESS: Mapping[str, str] = {
    "task_type": "a label; the head of another task comes as a tensor, which is refused",
    "auto_mapping": "Python class of the base it was trained on",
    "peft_version": "a label",
    "base_model_name_or_path": "a label; shapes are checked against the base that is served",
    "revision": "a label",
    "inference_mode": "whether PEFT would train it",
    "lora_dropout": "training only",
    "megatron_core": "a module name, read only with megatron_config, which is refused",
    "loftq_config": "initialisation only; init_lora_weights decides",
    "eva_config": "initialisation only; init_lora_weights decides",
    "corda_config": "initialisation only; init_lora_weights decides",
    "lora_ga_config": "initialisation only; init_lora_weights decides",
    "velora_config": "changes the backward pass only",
    "qalora_group_size": "read only with use_qalora, which is refused",
    "runtime_config": "where PEFT computes; never what",
}


@dataclass(frozen=True, slots=True)
class Refusal:
    """A field that is accepted only at one of its `neutral` values, or null."""

    neutral: tuple[object, ...]
    cure: str


_MERGE = "merge the adapter into its base and serve that as a base model"
_RETRAIN = "train without it"

REFUSED: Mapping[str, Refusal] = {
    "layer_replication": Refusal(
        ([],), "it builds a deeper base; save that model and serve it as a base of its own"
    ),
    "target_parameters": Refusal(([],), "a Llama has only modules; name them in target_modules"),
    "fan_in_fan_out": Refusal(
        (False,), "the linears of a Llama store [out, in]; set it to false if the base was a Llama"
    ),
    "init_lora_weights": Refusal(
        # These leave the base as it was and train A and B as usual.
        (True, False, "gaussian", "orthogonal", "eva", "mica"),
        "such a start changes the base weights, so answers on the original base would be wrong; "
        "pissa, olora, corda, lora_ga: save again with PEFT's save_pretrained(..., "
        f"path_initial_model_for_weight_conversion=...); loftq: {_MERGE}",
    ),
    "megatron_config": Refusal(
        ({},), "Megatron's parallel linears are not supported; train with PEFT's"
    ),
    "use_qalora": Refusal((False,), f"QA-LoRA pools its inputs; {_RETRAIN}"),
    "monteclora_config": Refusal((), f"Monte Carlo sampling is not supported; {_RETRAIN}"),
    "use_bdlora": Refusal((), f"block-diagonal LoRA is not supported; {_RETRAIN}"),
    "arrow_config": Refusal((), "Arrow routing is not supported; serve its adapters one by one"),
    "kasa_config": Refusal((), f"KaSA truncates the base weights; {_MERGE}"),
}


@dataclass(frozen=True, slots=True)
class LoraSpec:
    """The honoured fields of one config, checked one by one but not yet against a model."""

    rank: int
    alpha: float
    rslora: bool
    targets: str | frozenset[str]  # a regular expression (or "all-linear"), or path endings
    exclude: str | frozenset[str]
    layers: frozenset[int] | None  # None = all
    layers_patterns: tuple[str, ...]
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    dora: bool = False
    lora_bias: bool = False
    bias: str = "none"  # which biases of the base were trained: "none", "all" or "lora_only"
    invocation: tuple[int, ...] = ()  # activated LoRA: the tokens that activate it
    saved: tuple[str, ...] = ()  # endings of the paths of modules that were trained in full
    token_ids: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # by a path's ending
    tying: bool = False  # what is trained of a tied embedding or head is trained of both


def parse_config(data: bytes) -> LoraSpec:
    """Reads the bytes of an `adapter_config.json`, or raises AdapterInvalid naming the field."""
    if data.count(b"[") + data.count(b"{") > MAX_NAMES:  # it would take long to parse
        raise AdapterInvalid(f"adapter_config.json has more than {MAX_NAMES} lists and objects")
    raw = strict_json(data, "adapter_config.json")
    if "peft_type" not in raw and "lora_parameters" in raw:
        raise AdapterInvalid(
            "this is an adapter of MLX-LM, which stores its matrices transposed and under names of "
            "its own; convert it first: multilora adapters convert FOLDER NEW_FOLDER"
        )
    if raw.get("peft_type") != "LORA":
        raise AdapterInvalid(
            f"peft_type={shown(raw.get('peft_type'))} is refused; multilora serves LORA adapters"
        )
    for name, value in raw.items():
        _decide(name, value)
    targets = raw.get("target_modules")
    spec = LoraSpec(
        rank=_rank("r", raw.get("r")),
        alpha=_alpha("lora_alpha", raw.get("lora_alpha")),
        rslora=_flag("use_rslora", raw.get("use_rslora")),
        targets=_names("target_modules", LLAMA_TARGETS if targets is None else targets),
        exclude=_names("exclude_modules", raw.get("exclude_modules") or []),
        layers=_layers(raw.get("layers_to_transform")),
        layers_patterns=_layers_patterns(raw.get("layers_pattern")),
        rank_pattern=_table("rank_pattern", raw.get("rank_pattern"), _rank),
        alpha_pattern=_table("alpha_pattern", raw.get("alpha_pattern"), _alpha),
        dora=_flag("use_dora", raw.get("use_dora")),
        lora_bias=_flag("lora_bias", raw.get("lora_bias")),
        bias=_bias(raw.get("bias")),
        invocation=_invocation(raw.get("alora_invocation_tokens")),
        saved=_saved(raw.get("modules_to_save")),
        token_ids=_token_ids(raw.get("trainable_token_indices")),
        tying=_flag("ensure_weight_tying", raw.get("ensure_weight_tying")),
    )
    _check_together(spec)
    return spec


def _check_together(spec: LoraSpec) -> None:
    """Raises for fields that exclude each other."""
    for_all = (
        ("bias", spec.bias != "none"),
        ("modules_to_save", bool(spec.saved)),
        ("trainable_token_indices", bool(spec.token_ids)),
    )
    if spec.invocation and spec.dora:
        raise AdapterInvalid(
            "alora_invocation_tokens is refused with use_dora: PEFT has no such adapter"
        )
    for name, is_there in for_all:
        if spec.invocation and is_there:
            raise AdapterInvalid(
                f"alora_invocation_tokens is refused with {name}: all tokens have it, also those "
                "before the invocation"
            )
    if spec.dora and spec.lora_bias:
        raise AdapterInvalid("use_dora with lora_bias is refused: PEFT has no such adapter")
    if spec.layers is not None and isinstance(spec.targets, str):
        raise AdapterInvalid(
            "layers_to_transform needs a list in target_modules; put the layers into the expression"
        )
    if spec.layers is None and spec.layers_patterns:
        raise AdapterInvalid("layers_pattern has no meaning without layers_to_transform; give both")


def _decide(name: str, value: object) -> None:
    """Raises if the field is refused at this value."""
    if name in HONOURED or name in HARMLESS or value is None:
        return
    if name in REFUSED:
        refusal = REFUSED[name]
        if not any(
            type(value) is type(neutral) and value == neutral for neutral in refusal.neutral
        ):
            raise AdapterInvalid(f"{name}={shown(value)} is refused: {refusal.cure}")
    elif value is not False and not (isinstance(value, str | list | dict) and not value):
        raise AdapterInvalid(
            f"{shown(name)}={shown(value)} is refused: multilora does not know this field, and to "
            "ignore it could change the answers; remove it if it has no meaning for inference"
        )


def _invocation(value: object) -> tuple[int, ...]:
    """Of an empty list PEFT makes a plain LoRA."""
    tokens = [] if value is None else value
    if not isinstance(tokens, list) or any(type(token) is not int or token < 0 for token in tokens):
        raise AdapterInvalid(
            f"alora_invocation_tokens must be a list of token ids, not {shown(value)}"
        )
    if len(tokens) > MAX_INVOCATION:
        raise AdapterInvalid(
            f"alora_invocation_tokens has {len(tokens)} tokens, more than {MAX_INVOCATION}; use a "
            "shorter phrase"
        )
    return tuple(tokens)


def _saved(value: object) -> tuple[str, ...]:
    names = [] if value is None else value
    if not isinstance(names, list) or any(type(name) is not str or not name for name in names):
        raise AdapterInvalid(f"modules_to_save must be a list of names, not {shown(value)}")
    if len(names) > MAX_SAVED:
        raise AdapterInvalid(f"modules_to_save has {len(names)} names, more than {MAX_SAVED}")
    return tuple(names)


def _token_ids(value: object) -> dict[str, tuple[int, ...]]:
    """PEFT takes a list as that of the embedding."""
    field = "trainable_token_indices"
    by_name = value if isinstance(value, dict) else {"embed_tokens": [] if value is None else value}
    found = {}
    for name, ids in by_name.items():
        if not isinstance(ids, list) or any(type(i) is not int or i < 0 for i in ids):
            raise AdapterInvalid(
                f"{field} must be a list of token ids, or an object of such lists by module, not "
                f"{shown(value)}"
            )
        if len(set(ids)) < len(ids):
            raise AdapterInvalid(f"{field} names a token twice, so that its row is not one")
        if ids:
            found[name] = tuple(ids)
    return found


def _bias(value: object) -> str:
    if value is None:
        return "none"
    if not isinstance(value, str) or value not in BIASES:
        raise AdapterInvalid(f"bias must be {', '.join(BIASES)}, not {shown(value)}")
    return value


def _rank(name: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise AdapterInvalid(f"{name} must be a positive integer, not {shown(value)}")
    return value


def _alpha(name: str, value: object) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            alpha = float(value)
        except OverflowError:
            alpha = math.inf
        if math.isfinite(alpha):
            return alpha
    raise AdapterInvalid(f"{name} must be a finite number, not {shown(value)}")


def _flag(name: str, value: object) -> bool:
    if value is not None and not isinstance(value, bool):
        raise AdapterInvalid(f"{name} must be true or false, not {shown(value)}")
    return bool(value)


def _names(name: str, value: object) -> str | frozenset[str]:
    if isinstance(value, str):
        return value
    if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
        _few(name, value)
        return frozenset(value)
    raise AdapterInvalid(f"{name} must be a string or a list of strings, not {shown(value)}")


def _few(name: str, value: Sized) -> None:
    if len(value) > MAX_NAMES:
        raise AdapterInvalid(
            f"{name} names {len(value)} modules, more than the {MAX_NAMES} that any base here has"
        )


def _layers(value: object) -> frozenset[int] | None:
    layers = value if isinstance(value, list) else [] if value is None else [value]
    if any(not isinstance(layer, int) or isinstance(layer, bool) for layer in layers):
        raise AdapterInvalid(
            f"layers_to_transform must be an integer or a list of integers, not {shown(value)}"
        )
    return frozenset(layers) or None  # PEFT takes an empty list as all layers


def _layers_patterns(value: object) -> tuple[str, ...]:
    patterns = value if isinstance(value, list) else [value] if value else []
    if any(not isinstance(pattern, str) for pattern in patterns):
        raise AdapterInvalid(
            f"layers_pattern must be a string or a list of strings, not {shown(value)}"
        )
    return tuple(patterns)


def _table(name: str, value: Any, check: Callable[[str, object], V]) -> dict[str, V]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise AdapterInvalid(f"{name} must be an object, not {shown(value)}")
    _few(name, value)
    return {key: check(f"{name}[{shown(key)}]", item) for key, item in value.items()}
