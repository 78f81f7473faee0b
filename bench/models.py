"""Writes random Llamas, PEFT adapters and a tokenizer of words to disk."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

from checkout import load_checkout
from work import Shape, Work, rank_of

load_checkout()

import torch  # noqa: E402 - the checkout's packages come first

from multilora.config.model import ModelConfig, RopeScaling  # noqa: E402
from tests.harness import adapter_folders, model_folders  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def write_all(work: Work) -> None:
    """The base, its tokenizer and the adapters, unless they are there."""
    write_base(work.base, work.shape)
    for i, path in enumerate(work.adapters):
        write_adapter(path, work.shape, i)


def write_base(folder: Path, shape: Shape) -> None:
    """A Llama whose logits have a spread near 1, so that greedy choices are seldom near ties."""

    def write(part: Path) -> None:
        config = config_of(shape)
        model_folders.write_checkpoint(
            part,
            config=config,
            dtype=getattr(torch, shape.dtype),
            extra_config=both_spellings(config),
        )
        write_tokenizer(part, shape.vocab)

    _write_once(folder, write)


def config_of(shape: Shape) -> ModelConfig:
    """In the shape of Llama 3.1's. Nothing ends an answer early."""
    return ModelConfig(
        hidden_size=shape.hidden,
        num_layers=shape.layers,
        num_heads=shape.heads,
        num_kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        intermediate_size=shape.inter,
        vocab_size=shape.vocab,
        max_position_embeddings=131_072,
        rms_norm_eps=1e-5,
        rope_theta=500_000.0,
        rope_scaling=RopeScaling(
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=8192,
        ),
        tie_word_embeddings=shape.tied,
        dtype=shape.dtype,
    )


def both_spellings(config: ModelConfig) -> dict[str, Any]:
    """What older readers call by other names, and no end of sequence."""
    rope = model_folders.hf_config(config)["rope_parameters"]
    scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
    old = {"rope_theta": config.rope_theta, "rope_scaling": scaling, "torch_dtype": config.dtype}
    return {**old, "bos_token_id": None, "eos_token_id": None}


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
    rank = rank_of(index)

    def write(part: Path) -> None:
        adapter_folders.write_adapter(
            part,
            config_of(shape),
            rank=rank,
            alpha=2 * rank,
            seed=100 + index,
            dtype=getattr(torch, shape.dtype),
            scale=None,
            base_model_name_or_path=None,
            inference_mode=True,
        )

    _write_once(path, write)


def _write_once(folder: Path, write: Callable[[Path], None]) -> None:
    """Has a folder written under another name first, so that an interrupted run leaves none."""
    if any(folder.glob("*.safetensors")):
        return
    part = folder.with_name(f"{folder.name}.part")
    for path in (part, folder):
        shutil.rmtree(path, ignore_errors=True)
    write(part)
    part.rename(folder)
