"""Weights by name into their targets. Oracle: transformers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from multilora.checkpoint.parts import fill
from multilora.checkpoint.reader import load_checkpoint, read_base_weight, read_config
from tests.harness import model_folders as make
from tests.harness.checkpoint_loading import (
    assert_same,
    edit_weights,
    empty_targets,
    loaded,
    refused,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from multilora.config.model import ModelConfig

Q = "model.layers.0.self_attn.q_proj.weight"
HEAD = "lm_head.weight"
EMBED = "model.embed_tokens.weight"


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard_size", ["50GB", "60KB"])
def test_loads_what_transformers_saves(tmp_path: Path, shard_size: str, tied: bool) -> None:
    transformers = pytest.importorskip("transformers")
    config = replace(make.TINY, tie_word_embeddings=tied, attention_bias=True, mlp_bias=True)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**make.hf_config(config)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard_size == "60KB")
    assert replace(read_config(tmp_path), dtype="float32") == config
    want = {name: p.detach() for name, p in model.named_parameters()}
    assert_same(loaded(tmp_path, config), want)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_loads_every_dtype_bit_for_bit(tmp_path: Path, dtype: torch.dtype, shards: int) -> None:
    config = make.write_checkpoint(tmp_path, dtype=dtype, shards=shards)
    want = make.random_weights(config, dtype=dtype)
    assert_same(loaded(tmp_path, config, dtype=dtype), want)


@pytest.mark.parametrize(
    ("stored", "wanted"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.bfloat16),
    ],
)
def test_casts_once_to_the_dtype_of_the_target(
    tmp_path: Path, stored: torch.dtype, wanted: torch.dtype
) -> None:
    config = make.write_checkpoint(tmp_path, dtype=stored)
    want = {n: w.to(wanted) for n, w in make.random_weights(config, dtype=stored).items()}
    assert_same(loaded(tmp_path, config, dtype=wanted), want)


def test_fills_row_slices_of_a_fused_parameter(tmp_path: Path) -> None:
    config = make.write_checkpoint(tmp_path)
    weights = make.random_weights(config)
    targets = empty_targets(config)
    names = [f"model.layers.0.self_attn.{m}_proj.weight" for m in "qkv"]
    rows = [weights[name].shape[0] for name in names]
    fused = torch.nn.Parameter(torch.zeros(sum(rows), config.hidden_size))
    targets |= dict(zip(names, fused.split(rows), strict=True))
    load_checkpoint(tmp_path, [fill(targets)], config)
    assert torch.equal(fused, torch.cat([weights[name] for name in names]))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("write", [make.write_checkpoint, make.write_meta_checkpoint])
def test_reads_the_matrices_of_the_base_alone(
    tmp_path: Path, write: Callable[..., ModelConfig], tied: bool
) -> None:
    config = write(tmp_path, dtype=torch.bfloat16, tie_word_embeddings=tied)
    want = make.random_weights(config, dtype=torch.bfloat16)
    assert torch.equal(read_base_weight(tmp_path, "embed", config), want[EMBED])
    head = read_base_weight(tmp_path, "lm_head", config)
    assert torch.equal(head, want[EMBED if tied else HEAD])


def test_names_missing_weights_and_counts_the_rest(tmp_path: Path) -> None:
    config = make.write_checkpoint(tmp_path)
    edit_weights(tmp_path, lambda w: [w.pop(n) for n in list(w) if "layers.1" in n])
    text = refused(tmp_path, config)
    assert "lacks 9 of the model's 21 weights" in text
    assert "model.layers.1." in text
    assert "and 4 more" in text


def test_names_extra_weights(tmp_path: Path) -> None:
    config = make.write_checkpoint(tmp_path, attention_bias=True)
    text = refused(tmp_path, replace(config, attention_bias=False))
    assert "holds 8 weights that the model does not have" in text
    assert "_proj.bias" in text


def test_names_a_misshapen_weight_with_both_shapes(tmp_path: Path) -> None:
    config = make.write_checkpoint(tmp_path)
    edit_weights(tmp_path, lambda w: w.update({Q: torch.ones(32, 64)}))
    text = refused(tmp_path, config)
    assert Q in text
    assert "[32, 64]" in text
    assert "[64, 64]" in text


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.float8_e4m3fn])
def test_refuses_other_dtypes_by_name(tmp_path: Path, dtype: torch.dtype) -> None:
    config = make.write_checkpoint(tmp_path)
    edit_weights(tmp_path, lambda w: w.update({Q: w[Q].to(dtype)}))
    text = refused(tmp_path, config)
    assert Q in text
    assert {"float64": "F64", "int8": "I8"}.get(str(dtype)[6:], "F8_E4M3") in text


def test_accepts_a_stored_head_that_repeats_the_tied_embedding(tmp_path: Path) -> None:
    config = make.write_checkpoint(tmp_path, tie_word_embeddings=True)
    edit_weights(tmp_path, lambda w: w.update({HEAD: w[EMBED].clone()}))
    assert HEAD not in loaded(tmp_path, config, dtype=torch.bfloat16)


def test_refuses_a_stored_head_that_differs_from_the_tied_embedding(tmp_path: Path) -> None:
    config = make.write_checkpoint(tmp_path, tie_word_embeddings=True)
    edit_weights(tmp_path, lambda w: w.update({HEAD: w[EMBED].flip(0)}))
    assert "to the embedding, but they differ" in refused(tmp_path, config)


def test_a_stored_head_may_be_a_rounding_of_the_tied_embedding(tmp_path: Path) -> None:
    config = make.write_checkpoint(tmp_path, tie_word_embeddings=True)
    edit_weights(tmp_path, lambda w: w.update({HEAD: w[EMBED].bfloat16()}))
    assert HEAD not in loaded(tmp_path, config)


def test_names_the_head_that_an_untied_model_lacks(tmp_path: Path) -> None:
    config = make.write_checkpoint(tmp_path, tie_word_embeddings=True)
    assert HEAD in refused(tmp_path, replace(config, tie_word_embeddings=False))


BIG = {
    "hidden_size": 512,
    "num_heads": 8,
    "num_kv_heads": 8,
    "head_dim": 64,
    "intermediate_size": 1536,
    "vocab_size": 8192,
    "num_layers": 3,
}


# The targets are filled first, so that growth is what loading itself needs.
MEASURE = """
import json, os, threading, torch
from multilora.checkpoint.reader import Part, load_checkpoint, read_config
torch.set_num_threads(1)
config = read_config(os.environ["FOLDER"])
shapes = json.loads(os.environ["SHAPES"])
targets = {name: torch.ones(shape) for name, shape in shapes.items()}

def memory(field):
    for line in open("/proc/self/status"):
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise SystemExit(field + " is unknown")

def watched(name, target):
    def load(read):
        weight = read(name)
        target.copy_(weight)
        samples.append(memory(os.environ["FIELD"]))  # both are in memory: the peak
    return Part({name: tuple(target.shape)}, load)

samples = []
before = memory(os.environ["FIELD"])
load_checkpoint(os.environ["FOLDER"], [watched(*item) for item in targets.items()], config)
samples.append(memory("VmHWM") if os.environ["FIELD"] == "VmRSS" else before)
print(max(samples) - before)
"""


@pytest.mark.seconds
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("layout", ["hf", "meta"])
def test_peak_memory_is_the_model_and_one_tensor(
    tmp_path: Path, run_python: Callable[..., str], layout: str
) -> None:
    if layout == "hf":
        config = make.write_checkpoint(tmp_path, **BIG)
    else:
        config = make.write_meta_checkpoint(tmp_path, shards=2, **BIG)
    shapes = make.weight_shapes(config)
    sizes = [4 * torch.Size(shape).numel() for shape in shapes.values()]
    assert sum(sizes) > 64e6
    # Hugging Face: all memory. Meta: the files stay mapped, which the kernel can take back at any
    # time, so only memory of our own is counted.
    field = "VmRSS" if layout == "hf" else "RssAnon"
    env = {"FOLDER": str(tmp_path), "SHAPES": json.dumps(shapes), "FIELD": field}
    grown = int(run_python(MEASURE, OMP_NUM_THREADS="1", **env))
    assert grown <= max(sizes) + 8e6, f"{grown / 1e6:.1f} MB"
