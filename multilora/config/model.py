"""What a user can set, and what a checkpoint says of itself. Frozen and validated once."""

from __future__ import annotations

import json
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, shown
from .rope import RopeScaling, number, read_rope_scaling, size

if TYPE_CHECKING:
    from collections.abc import Mapping


MAX_LAYERS = 1000  # of no model that is known; the memory for their objects is bounded
DTYPES = ("float32", "bfloat16", "float16")


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
            size({name: getattr(self, name)}, name)
        if self.num_layers > MAX_LAYERS:
            raise CheckpointError(
                f"model config: {self.num_layers} layers are more than {MAX_LAYERS}"
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
                raise CheckpointError(f"model config: {shown(token)} is no token id")
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
        _check_family(raw)
        if raw.get("hidden_act", "silu") != "silu":
            raise CheckpointError(
                f"hidden_act {raw['hidden_act']!r} is not supported; Llama uses silu"
            )
        _refuse_quantized(raw.get("quantization_config"))
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        if not isinstance(rope, dict):
            raise CheckpointError(f"model config: rope_parameters must be an object, not {rope!r}")
        theta = number({"rope_theta": raw.get("rope_theta"), **rope}, "rope_theta", 10_000.0)
        hidden, heads = size(raw, "hidden_size"), size(raw, "num_attention_heads")
        positions = size(raw, "max_position_embeddings", 2048)
        eos = raw.get("eos_token_id")
        return cls(
            hidden_size=hidden,
            num_layers=size(raw, "num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=size(raw, "num_key_value_heads", heads),
            head_dim=size(raw, "head_dim", max(hidden // heads, 1)),
            intermediate_size=size(raw, "intermediate_size"),
            vocab_size=size(raw, "vocab_size"),
            max_position_embeddings=positions,
            rms_norm_eps=number(raw, "rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_scaling=read_rope_scaling(rope, positions),
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
        for key, value in raw.items():
            if key not in META_KEYS and value:
                raise CheckpointError(
                    f"params.json: {shown(key)}={shown(value)} is not of a plain Llama; give the "
                    "plain text model, unquantised, of Llama 2 to 3.3"
                )
        dim, heads = size(raw, "dim"), size(raw, "n_heads")
        # Meta's own rule for the width of the feed-forward layer.
        inter = int(2 * 4 * dim / 3)
        inter = int(number(raw, "ffn_dim_multiplier", 1.0) * inter)
        multiple = size(raw, "multiple_of", 256)
        inter = multiple * ((inter + multiple - 1) // multiple)
        vocab = raw.get("vocab_size", -1)
        if vocab == -1:
            if facts is None:
                raise CheckpointError(
                    "params.json gives no vocab_size; set it to the number of rows of "
                    "tok_embeddings.weight (32000 for Llama 2, 128256 for Llama 3)"
                )
            vocab = facts.vocab_size
        vocab = size({"vocab_size": vocab}, "vocab_size")
        scaled = bool(raw.get("use_scaled_rope", False))
        return cls(
            hidden_size=dim,
            num_layers=size(raw, "n_layers"),
            num_heads=heads,
            num_kv_heads=size(raw, "n_kv_heads", heads),
            head_dim=dim // heads,
            intermediate_size=inter,
            vocab_size=vocab,
            max_position_embeddings=131_072 if scaled else 8192 if vocab >= 128_000 else 4096,
            rms_norm_eps=number(raw, "norm_eps", 1e-5),
            rope_theta=number(raw, "rope_theta", 10_000.0),
            rope_scaling=_meta_rope_scaling(raw) if scaled else None,
            tie_word_embeddings=facts.tied if facts else False,
            dtype=facts.dtype if facts else "bfloat16",
        )


MAX_JSON_BYTES = 256 << 20  # the largest tokenizer.json in use has 33 MB


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or a CheckpointError that names the file."""
    try:
        info = path.stat()
        if not stat.S_ISREG(info.st_mode):  # reading a pipe waits for its writer
            raise CheckpointError(f"{path} is not a regular file; only regular files are read")
        if info.st_size > MAX_JSON_BYTES:
            raise CheckpointError(
                f"{path} has {info.st_size} bytes, above the limit of {MAX_JSON_BYTES}"
            )
        text = path.read_text(encoding="utf-8")
        if text.startswith("version https://git-lfs"):
            raise CheckpointError(
                f"{path} is a Git LFS pointer; fetch the file with `git lfs pull`"
            )
        value = json.loads(text)
    except RecursionError as error:
        raise CheckpointError(f"{path} is nested too deep") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value


META_KEYS = frozenset(
    (
        *("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "norm_eps"),
        *("ffn_dim_multiplier", "rope_theta", "use_scaled_rope", "rope_scaling_factor"),
        *("high_freq_factor", "max_batch_size", "max_seq_len"),
    )
)
"""What `from_meta` reads of params.json, and two sizes of Meta's own runtime."""


def _check_family(raw: Mapping[str, Any]) -> None:
    """Llama, in its old spelling too, and Mistral where it is one: without a sliding window.

    transformers goes by `model_type`, and so does this.
    """
    architectures = raw.get("architectures") or []
    kind = raw.get("model_type", "llama")
    names = {"llama": ("LlamaForCausalLM", "LLaMAForCausalLM"), "mistral": ("MistralForCausalLM",)}
    known = names.get(kind, ()) if isinstance(kind, str) else ()
    if (
        not known
        or not isinstance(architectures, list)
        or any(a not in known for a in architectures)
    ):
        raise CheckpointError(
            f"architectures {shown(architectures)} of model_type {shown(kind)} are not supported; "
            "multilora serves LlamaForCausalLM, and MistralForCausalLM without a sliding window"
        )
    window = raw.get("sliding_window", 4096 if kind == "mistral" else None)
    if kind == "mistral" and window is not None:
        raise CheckpointError(
            f"sliding_window {shown(window)} is not supported; Mistral 7B v0.2 and later have none"
        )


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
        factor=number(raw, "rope_scaling_factor", usual),
        low_freq_factor=1.0,
        high_freq_factor=number(raw, "high_freq_factor", 4.0),
        original_max_position_embeddings=8192,
    )
