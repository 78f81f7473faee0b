"""What a user can set, and what a checkpoint says of itself. Frozen and validated once."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping


DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """Llama 3.1's frequency scaling (`rope_type: llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MetaFacts:
    """What only the weights of a Meta checkpoint tell; `checkpoint.read_config` looks it up."""

    vocab_size: int
    dtype: str
    tied: bool  # there is no output.weight


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The shape of a Llama. Field names are Hugging Face's where it has one."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    dtype: str = "bfloat16"
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in (
            "hidden_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "intermediate_size",
            "vocab_size",
            "max_position_embeddings",
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise CheckpointError(
                    f"model config: {name} must be a positive integer, not {value!r}"
                )
        if self.num_heads % self.num_kv_heads:
            raise CheckpointError(
                f"model config: {self.num_heads} attention heads cannot share "
                f"{self.num_kv_heads} key-value heads evenly"
            )
        if self.head_dim % 2:
            raise CheckpointError(
                f"model config: head_dim {self.head_dim} is odd; RoPE needs pairs"
            )
        for token in (
            *self.eos_token_ids,
            *(() if self.bos_token_id is None else (self.bos_token_id,)),
        ):
            if not isinstance(token, int) or isinstance(token, bool):
                raise CheckpointError(f"model config: {token!r} is no token id")
        if self.dtype not in DTYPES:
            raise CheckpointError(
                f"model config: dtype {self.dtype!r} is not one of {', '.join(DTYPES)}"
            )

    @classmethod
    def from_dir(cls, folder: str | Path) -> ModelConfig:
        """Reads `config.json` (Hugging Face) or `params.json` (Meta), and no other file.

        `checkpoint.read_config` is the same, and also asks Meta's weights what params.json omits.
        """
        folder = Path(folder)
        if (folder / "config.json").is_file():
            return cls.from_hf(read_json(folder / "config.json"))
        if (folder / "params.json").is_file():
            return cls.from_meta(read_json(folder / "params.json"))
        raise CheckpointError(
            f"{folder} holds neither config.json (Hugging Face) nor params.json (Meta); "
            "give the folder of a Llama checkpoint"
        )

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> ModelConfig:
        """From the contents of a Hugging Face `config.json`, in its old and new spellings."""
        architectures = raw.get("architectures") or ["LlamaForCausalLM"]
        model_type = raw.get("model_type", "llama")
        if architectures != ["LlamaForCausalLM"] or model_type != "llama":
            raise CheckpointError(
                f"architectures {architectures!r} of model_type {model_type!r} are not supported; "
                "multilora serves LlamaForCausalLM of model_type llama"
            )
        if raw.get("hidden_act", "silu") != "silu":
            raise CheckpointError(
                f"hidden_act {raw['hidden_act']!r} is not supported; Llama uses silu"
            )
        _refuse_quantized(raw.get("quantization_config"))
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        if not isinstance(rope, dict):
            raise CheckpointError(f"model config: rope_parameters must be an object, not {rope!r}")
        theta = _number({"rope_theta": raw.get("rope_theta"), **rope}, "rope_theta", 10_000.0)
        hidden, heads = _size(raw, "hidden_size"), _size(raw, "num_attention_heads")
        eos = raw.get("eos_token_id")
        return cls(
            hidden_size=hidden,
            num_layers=_need(raw, "num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=raw.get("num_key_value_heads") or heads,
            head_dim=raw.get("head_dim") or hidden // heads,
            intermediate_size=_need(raw, "intermediate_size"),
            vocab_size=_need(raw, "vocab_size"),
            max_position_embeddings=raw.get("max_position_embeddings", 2048),
            rms_norm_eps=_number(raw, "rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_scaling=_rope_scaling(rope),
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            attention_bias=bool(raw.get("attention_bias", False)),
            mlp_bias=bool(raw.get("mlp_bias", False)),
            dtype=raw.get("dtype") or raw.get("torch_dtype") or "float32",
            bos_token_id=raw.get("bos_token_id"),
            eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
        )

    @classmethod
    def from_meta(cls, raw: Mapping[str, Any], facts: MetaFacts | None = None) -> ModelConfig:
        """From the contents of Meta's `params.json`, and what its weights tell if they are known.

        Without `facts` the weights are taken to be untied bfloat16, and a `vocab_size` of -1, which
        Llama 2 has, is an error.
        """
        for key in ("lora_args", "quantization_args", "vision_model", "vision_chunk_size"):
            if raw.get(key):
                raise CheckpointError(
                    f"params.json: {key} is not supported; give the plain text model"
                )
        dim, heads = _size(raw, "dim"), _size(raw, "n_heads")
        # Meta's own rule for the width of the feed-forward layer.
        inter = int(2 * 4 * dim / 3)
        inter = int(_number(raw, "ffn_dim_multiplier", 1.0) * inter)
        multiple = _size(raw, "multiple_of", 256)
        inter = multiple * ((inter + multiple - 1) // multiple)
        vocab = raw.get("vocab_size", -1)
        if vocab == -1:
            if facts is None:
                raise CheckpointError(
                    "params.json gives no vocab_size; set it to the number of rows of "
                    "tok_embeddings.weight (32000 for Llama 2, 128256 for Llama 3)"
                )
            vocab = facts.vocab_size
        vocab = _size({"vocab_size": vocab}, "vocab_size")
        scaled = bool(raw.get("use_scaled_rope", False))
        return cls(
            hidden_size=dim,
            num_layers=_need(raw, "n_layers"),
            num_heads=heads,
            num_kv_heads=raw.get("n_kv_heads") or heads,
            head_dim=dim // heads,
            intermediate_size=inter,
            vocab_size=vocab,
            max_position_embeddings=131_072 if scaled else 8192 if vocab >= 128_000 else 4096,
            rms_norm_eps=_number(raw, "norm_eps", 1e-5),
            rope_theta=_number(raw, "rope_theta", 10_000.0),
            rope_scaling=_meta_rope_scaling(raw) if scaled else None,
            tie_word_embeddings=facts.tied if facts else False,
            dtype=facts.dtype if facts else "bfloat16",
        )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or a CheckpointError that names the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value


def _refuse_quantized(found: object) -> None:
    """Raises for the `quantization_config` of GPTQ, AWQ, bitsandbytes and their like."""
    if not found:
        return
    method = found.get("quant_method") if isinstance(found, dict) else None
    raise CheckpointError(
        f"the checkpoint is quantised already (quant_method {method!r}), which is not supported; "
        "give the fp32, bf16 or fp16 checkpoint that it was made from: quantization='int8' or "
        "'int4' quantises it while it is loaded"
    )


def _meta_rope_scaling(raw: Mapping[str, Any]) -> RopeScaling:
    # params.json says use_scaled_rope but not the factor. It is 32 for Llama 3.2's 1B and 3B, the
    # only ones narrower than 4096, and 8 for 3.1, 3.3 and 3.2's text parts of 11B and 90B: Meta's
    # answer in github.com/meta-llama/llama-models, issues 166 and 241 (its own code had 8 for all).
    usual = 32.0 if raw["dim"] < 4096 else 8.0
    return RopeScaling(
        factor=_number(raw, "rope_scaling_factor", usual),
        low_freq_factor=1.0,
        high_freq_factor=_number(raw, "high_freq_factor", 4.0),
        original_max_position_embeddings=8192,
    )


def _need(raw: Mapping[str, Any], key: str) -> Any:
    if raw.get(key) is None:
        raise CheckpointError(f"model config: {key} is missing")
    return raw[key]


def _size(raw: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = _need(raw, key) if default is None or raw.get(key) is not None else default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"model config: {key} must be a positive integer, not {value!r}")
    return value


def _number(raw: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = _need(raw, key) if default is None or raw.get(key) is not None else default
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise CheckpointError(f"model config: {key} must be a positive number, not {value!r}")
    return float(value)


def _rope_scaling(rope: Mapping[str, Any]) -> RopeScaling | None:
    if _number(rope, "partial_rotary_factor", 1.0) != 1.0:
        raise CheckpointError("partial_rotary_factor is not supported for Llama")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if kind != "llama3":
        raise CheckpointError(f"rope_type {kind!r} is not supported; supported: default, llama3")
    return RopeScaling(
        factor=_number(rope, "factor"),
        low_freq_factor=_number(rope, "low_freq_factor"),
        high_freq_factor=_number(rope, "high_freq_factor"),
        original_max_position_embeddings=_size(rope, "original_max_position_embeddings"),
    )
