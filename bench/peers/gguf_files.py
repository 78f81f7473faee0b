"""Writes our checkpoints and adapters as GGUF files, with the package `gguf`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter, TokenType
from safetensors.numpy import load_file

LINEARS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
TOPS = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def write_base(folder: Path, path: Path) -> None:
    """The base in fp32, unless it is there; llama-quantize makes the others from it."""
    if path.is_file():
        return
    config = json.loads((folder / "config.json").read_text())
    part = path.with_suffix(".part")
    writer = GGUFWriter(part, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(0)  # all fp32
    _add_vocabulary(writer, config["vocab_size"])
    writer.add_tensor("rope_freqs.weight", _rope_factors(config))
    for name, weight in load_file(folder / "model.safetensors").items():
        writer.add_tensor(_name(name), _rotated(name, weight, config))
    _write(writer, part, path)


def write_adapter(base: Path, folder: Path, path: Path) -> None:
    """A PEFT adapter in the dtype that the file's name ends in, unless it is there."""
    if path.is_file():
        return
    config = json.loads((base / "config.json").read_text())
    alpha = json.loads((folder / "adapter_config.json").read_text())["lora_alpha"]
    part = path.with_suffix(".part")
    writer = GGUFWriter(part, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(alpha))
    dtype = np.float16 if path.stem.endswith("f16") else np.float32
    for key, weight in load_file(folder / "adapter_model.safetensors").items():
        name = key.removeprefix("base_model.model.")
        module, _, matrix = name.removesuffix(".weight").rpartition(".")
        if matrix == "lora_B":  # its rows are the outputs
            weight = _rotated(f"{module}.weight", weight, config)
        writer.add_tensor(f"{_name(module + '.weight')}.{matrix.lower()}", weight.astype(dtype))
    _write(writer, part, path)


def _name(name: str) -> str:
    """GGUF's name of a tensor of a Hugging Face checkpoint."""
    if name in TOPS:
        return TOPS[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{LINEARS[rest.removesuffix('.weight')]}.weight"


def _rotated(name: str, weight: np.ndarray, config: dict[str, Any]) -> np.ndarray:
    """Query and key rows in llama.cpp's order: RoPE pairs side by side, not half against half."""
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
    key = heads.get(name.split(".")[-2])
    if key is None:
        return weight
    halves = weight.reshape(config[key], 2, -1, weight.shape[-1])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(weight.shape)


def _rope_factors(config: dict[str, Any]) -> np.ndarray:
    """What Llama 3.1's scaling divides each frequency by, fp32 [head_dim / 2]."""
    rope, dim = config["rope_scaling"], config["head_dim"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    factors = []
    for i in range(0, dim, 2):
        wave = 2 * math.pi * config["rope_theta"] ** (i / dim)
        turns = rope["original_max_position_embeddings"] / wave
        blend = min(max((turns - low) / (high - low), 0.0), 1.0)
        factors.append(1.0 / (blend + (1.0 - blend) / rope["factor"]))
    return np.array(factors, dtype=np.float32)


def _add_vocabulary(writer: GGUFWriter, size: int) -> None:
    """One word for each token and no byte pieces: the server holds back half characters."""
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(["<unk>", "<s>", "</s>", *(f"\u2581w{i}" for i in range(3, size))])
    writer.add_token_scores([0.0] * size)
    special = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL]
    writer.add_token_types([*special, *[TokenType.NORMAL] * (size - 3)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)


def _write(writer: GGUFWriter, part: Path, path: Path) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    part.rename(path)
