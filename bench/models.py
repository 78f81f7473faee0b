"""Writes random Llamas, PEFT adapters and a tokenizer of words to disk."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from work import Shape, Work, rank_of

if TYPE_CHECKING:
    from pathlib import Path

ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def write_all(work: Work) -> None:
    """The base, its tokenizer and the adapters, unless they are there."""
    write_base(work.base, work.shape)
    for i, path in enumerate(work.adapters):
        write_adapter(path, work.shape, i)


def write_base(folder: Path, shape: Shape) -> None:
    """A Llama whose logits have a spread near 1, so that greedy choices are seldom near ties."""
    if (folder / "model.safetensors").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hf_config(shape), indent=2))
    write_tokenizer(folder, shape.vocab)
    generator, dtype = torch.Generator().manual_seed(0), getattr(torch, shape.dtype)

    def normal(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=generator) / math.sqrt(columns)).to(dtype)

    weights = {
        "model.norm.weight": torch.ones(shape.hidden, dtype=dtype),
        "model.embed_tokens.weight": normal(shape.vocab, shape.hidden),
    }
    if not shape.tied:
        weights["lm_head.weight"] = normal(shape.vocab, shape.hidden)
    for layer in range(shape.layers):
        path = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{path}.{norm}.weight"] = torch.ones(shape.hidden, dtype=dtype)
        for name, (parent, out, in_) in shape.linears.items():
            weights[f"{path}.{parent}.{name}.weight"] = normal(out, in_)
    _save(weights, folder / "model.safetensors")


def hf_config(shape: Shape) -> dict[str, Any]:
    """config.json, in the shape of Llama 3.1's and in both spellings of its RoPE."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.inter,
        "vocab_size": shape.vocab,
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-5,
        "attention_bias": False,
        "mlp_bias": False,
        "rope_theta": 500_000.0,
        "rope_scaling": ROPE,
        "rope_parameters": ROPE | {"rope_theta": 500_000.0},
        "tie_word_embeddings": shape.tied,
        "dtype": shape.dtype,
        "torch_dtype": shape.dtype,
        "bos_token_id": None,
        "eos_token_id": None,  # nothing ends an answer early
    }


def write_tokenizer(folder: Path, vocab: int) -> None:
    """Token i is the word `w<i>`: for peers that take text only, and readers that insist on one.

    No token is special: those would be missing from the text that a peer answers with.
    """
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import WordLevel

    words = {f"w{i}": i for i in range(vocab)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "w2",  # some readers insist on one
        "chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


def write_adapter(path: Path, shape: Shape, index: int) -> None:
    """A PEFT adapter on all linears, its delta a few percent of the base, unless it is there."""
    if (path / "adapter_model.safetensors").is_file():
        return
    path.mkdir(parents=True, exist_ok=True)
    rank, generator = rank_of(index), torch.Generator().manual_seed(100 + index)
    dtype, weights = getattr(torch, shape.dtype), {}
    for layer in range(shape.layers):
        for name, (parent, out, in_) in shape.linears.items():
            module = f"base_model.model.model.layers.{layer}.{parent}.{name}"
            a = torch.randn(rank, in_, generator=generator) / math.sqrt(in_)
            b = torch.randn(out, rank, generator=generator) * 0.1 / math.sqrt(rank)
            weights[f"{module}.lora_A.weight"] = a.to(dtype)
            weights[f"{module}.lora_B.weight"] = b.to(dtype)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": list(shape.linears),
        "bias": "none",
        "inference_mode": True,
    }
    (path / "adapter_config.json").write_text(json.dumps(config, indent=2))
    _save(weights, path / "adapter_model.safetensors")


def _save(weights: dict[str, torch.Tensor], path: Path) -> None:
    part = path.with_suffix(".part")
    save_file(weights, part, metadata={"format": "pt"})
    part.rename(path)  # so that an interrupted run leaves none
