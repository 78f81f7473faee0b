"""What a checkpoint says of itself. Oracle for config.json: transformers' LlamaConfig."""

from __future__ import annotations

import copy
import json
import os
from typing import TYPE_CHECKING, Any

import pytest

from multilora.config.model import MAX_JSON_BYTES, MetaFacts, ModelConfig, RopeScaling, read_json
from multilora.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

LLAMA_31_8B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
META_LLAMA_31_8B = {
    "dim": 4096,
    "n_layers": 32,
    "n_heads": 32,
    "n_kv_heads": 8,
    "vocab_size": 128256,
    "multiple_of": 1024,
    "ffn_dim_multiplier": 1.3,
    "norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "use_scaled_rope": True,
}
META_LLAMA_32_1B = META_LLAMA_31_8B | {
    "dim": 2048,
    "n_layers": 16,
    "multiple_of": 256,
    "ffn_dim_multiplier": 1.5,
}
META_LLAMA_2_7B = {
    "dim": 4096,
    "multiple_of": 256,
    "n_heads": 32,
    "n_layers": 32,
    "norm_eps": 1e-05,
    "vocab_size": -1,
}


def without(raw: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in raw.items() if key not in keys}


def test_reads_llama_31() -> None:
    assert ModelConfig.from_hf(LLAMA_31_8B) == ModelConfig(
        hidden_size=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        intermediate_size=14336,
        vocab_size=128256,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        rope_scaling=RopeScaling(
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=8192,
        ),
        dtype="bfloat16",
        bos_token_id=128000,
        eos_token_ids=(128001, 128008, 128009),
    )


def test_new_and_old_spellings_mean_the_same() -> None:
    new = without(LLAMA_31_8B, "rope_theta", "rope_scaling", "torch_dtype") | {
        "dtype": "bfloat16",
        "rope_parameters": {**LLAMA_31_8B["rope_scaling"], "rope_theta": 500000.0},  # type: ignore[dict-item]
    }
    assert ModelConfig.from_hf(new) == ModelConfig.from_hf(LLAMA_31_8B)


@pytest.mark.parametrize("scaled", [False, True])
def test_reads_what_transformers_writes(tmp_path: Path, scaled: bool) -> None:
    transformers = pytest.importorskip("transformers")
    raw = LLAMA_31_8B if scaled else LLAMA_31_8B | {"rope_scaling": None}
    transformers.LlamaConfig(**copy.deepcopy(raw)).save_pretrained(tmp_path)  # it writes in them
    assert ModelConfig.from_dir(tmp_path) == ModelConfig.from_hf(raw)


def test_defaults_are_those_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    needed = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    raw = {key: LLAMA_31_8B[key] for key in (*needed, "vocab_size")}
    theirs = transformers.LlamaConfig(**copy.deepcopy(raw))
    ours = ModelConfig.from_hf(raw)
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.head_dim == theirs.head_dim
    assert ours.max_position_embeddings == theirs.max_position_embeddings
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings


@pytest.mark.parametrize("given", [128009, [128009]])
def test_one_end_token_may_be_a_number_or_a_list(given: object) -> None:
    assert ModelConfig.from_hf(LLAMA_31_8B | {"eos_token_id": given}).eos_token_ids == (128009,)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"architectures": ["MistralForCausalLM"]}, "MistralForCausalLM"),
        ({"architectures": ["MistralForCausalLM"], "model_type": "mistral"}, "sliding_window 4096"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "SequenceClassification"),
        ({"architectures": "LlamaForCausalLM"}, "not supported"),
        ({"num_hidden_layers": 100_000}, "more than 1000"),
        ({"vocab_size": 2**31}, r"below 2\*\*31"),
        ({"head_dim": []}, "head_dim must be a positive integer"),
        ({"rope_theta": 10**400}, "rope_theta must be a positive number"),
        ({"model_type": "mllama"}, "mllama"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"quantization_config": {"bits": 4}}, "quantised already .quant_method None"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "longrope"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "factor is missing"),
        ({"rope_scaling": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_scaling": [1]}, "rope_parameters must be an object"),
        ({"num_key_value_heads": 5}, "cannot share 5 key-value heads"),
        ({"head_dim": 127}, "odd"),
        ({"num_attention_heads": 0}, "num_attention_heads must be a positive integer"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"torch_dtype": "float64"}, "float64"),
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps must be a positive number"),
        ({"eos_token_id": ["</s>"]}, "no token id"),
    ],
)
def test_refuses_with_the_reason(change: dict[str, Any], text: str) -> None:
    with pytest.raises(CheckpointError, match=text):
        ModelConfig.from_hf(LLAMA_31_8B | change)


@pytest.mark.parametrize("junk", ["x", "4096", -1, 0.5, float("nan"), [], {}, {"a": 1}, True])
@pytest.mark.parametrize("raw", [LLAMA_31_8B, META_LLAMA_31_8B], ids=["hf", "meta"])
def test_junk_in_a_field_is_refused_or_read_never_a_crash(raw: dict[str, Any], junk: Any) -> None:
    read = ModelConfig.from_hf if raw is LLAMA_31_8B else ModelConfig.from_meta
    refused = 0
    for key in raw:
        try:
            read(raw | {key: junk})
        except CheckpointError:
            refused += 1
    assert refused >= 4


def test_meta_and_hugging_face_agree_on_llama_31() -> None:
    want = ModelConfig.from_hf(without(LLAMA_31_8B, "bos_token_id", "eos_token_id"))
    assert ModelConfig.from_meta(META_LLAMA_31_8B) == want


def test_small_llama_32_has_its_own_rope_factor_and_width() -> None:
    config = ModelConfig.from_meta(META_LLAMA_32_1B)
    assert config.rope_scaling is not None
    assert config.rope_scaling.factor == 32.0
    assert (config.intermediate_size, config.head_dim) == (8192, 64)


def test_llama_2_takes_its_vocabulary_from_the_weights() -> None:
    facts = MetaFacts(vocab_size=32000, dtype="float16", tied=False)
    config = ModelConfig.from_meta(META_LLAMA_2_7B, facts)
    assert (config.vocab_size, config.dtype, config.num_kv_heads) == (32000, "float16", 32)
    assert (config.intermediate_size, config.max_position_embeddings) == (11008, 4096)
    assert config.rope_scaling is None
    with pytest.raises(CheckpointError, match="gives no vocab_size"):
        ModelConfig.from_meta(META_LLAMA_2_7B)


@pytest.mark.parametrize(
    "key", ["lora_args", "quantization_args", "vision_model", "vision_chunk_size"]
)
def test_refuses_meta_models_that_are_not_plain(key: str) -> None:
    with pytest.raises(CheckpointError, match=key):
        ModelConfig.from_meta(META_LLAMA_31_8B | {key: {"rank": 16}})


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "\udcff"])
def test_a_malformed_json_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        ModelConfig.from_dir(tmp_path)


def test_config_json_goes_before_params_json(tmp_path: Path) -> None:
    (tmp_path / "params.json").write_text(json.dumps(META_LLAMA_32_1B))
    assert ModelConfig.from_dir(tmp_path).hidden_size == 2048
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_31_8B))
    assert ModelConfig.from_dir(tmp_path).hidden_size == 4096


def test_a_folder_without_a_config_says_what_it_should_hold(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="neither"):
        ModelConfig.from_dir(tmp_path)


@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors", "bitsandbytes", "fp8"])
def test_a_checkpoint_that_is_quantized_already_is_refused_with_a_cure(method: str) -> None:
    raw = LLAMA_31_8B | {"quantization_config": {"quant_method": method, "bits": 4}}
    with pytest.raises(CheckpointError, match=f"'{method}'.*quantization='int8'"):
        ModelConfig.from_hf(raw)


def test_other_spellings_of_a_llama() -> None:
    """decapoda's files of 2023, and Mistral 7B from v0.2 on, which slides no window."""
    plain = ModelConfig.from_hf(LLAMA_31_8B)
    old = LLAMA_31_8B | {"architectures": ["LLaMAForCausalLM"]}
    mistral = LLAMA_31_8B | {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "sliding_window": None,
    }
    for raw in (old, mistral, without(LLAMA_31_8B, "architectures")):
        assert ModelConfig.from_hf(raw) == plain


@pytest.mark.parametrize(
    ("key", "value"),
    [("use_qk_norm", True), ("act_fn", "gelu"), ("quantization_args", {"group_size": 32})],
)
def test_what_executorch_adds_to_params_json_is_refused_by_name(key: str, value: Any) -> None:
    """Its Qwen3 and Gemma files: served as Llamas they would answer nonsense."""
    with pytest.raises(CheckpointError, match=key):
        ModelConfig.from_meta(META_LLAMA_31_8B | {key: value})
    assert ModelConfig.from_meta(META_LLAMA_31_8B | {"use_qk_norm": False}) == (
        ModelConfig.from_meta(META_LLAMA_31_8B)
    )


def test_json_that_is_none_is_named(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    for text, words in (
        ("[" * 100_000, "is nested too deep"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n", "Git LFS pointer"),
        ("{", "cannot be read as JSON"),
        ("[]", "must hold a JSON object"),
    ):
        path.write_text(text)
        with pytest.raises(CheckpointError, match=words):
            ModelConfig.from_dir(tmp_path)


def test_a_file_that_is_none_or_too_large_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    os.mkfifo(path)  # to read it would wait for ever
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_json(path)
    path.unlink()
    with path.open("wb") as file:
        file.truncate(MAX_JSON_BYTES + 1)
    with pytest.raises(CheckpointError, match="above the limit of"):
        read_json(path)
