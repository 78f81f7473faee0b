"""A base that is quantised while it is loaded. Oracle: PEFT on the same base, dequantised."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import multilora_kernels as mk
from multilora.checkpoint.reader import load_checkpoint, read_config
from multilora.config.engine import EngineConfig
from multilora.config.lora_sites import sites_of
from multilora.config.quantization import Scheme, schemes_of
from multilora.errors import AdapterInvalid, CheckpointError
from multilora.model.llama import Llama
from tests.harness.adapter_folders import LINEARS, change_tensors, write_adapter
from tests.harness.model_folders import random_weights, write_checkpoint, write_meta_checkpoint
from tests.harness.reference_models import JOB_FIELDS, check
from tests.harness.tiny_engines import Job, facts, greedy, make_engine, prompt_of, run

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from multilora.config.model import ModelConfig

SETTINGS: dict[str, dict[str, Any]] = {
    "int8": {"quantization": "int8"},
    "int8-32": {"quantization": "int8", "quantization_group_size": 32},
    "int4": {"quantization": "int4"},
    "int4-64": {"quantization": "int4", "quantization_group_size": 64},
}
settings = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
tied = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])


def dequantized(weight: Tensor, scheme: Scheme) -> Tensor:
    codes, scales = mk.quantize(weight, *scheme)
    return mk.unpack(mk.pack_quantized(codes, scales, scheme.bits, scheme.group or weight.shape[1]))


def dequantized_weights(config: ModelConfig, schemes: Mapping[str, Scheme]) -> dict[str, Tensor]:
    """The weights of `write_checkpoint`, those of the schemes' sites quantised and back."""
    weights = random_weights(config)
    for site in sites_of(config).values():
        for layer in range(site.layers):
            for index in range(len(site.slices)):
                name = f"{site.module_path(layer, index)}.weight"
                if config.tie_word_embeddings and site.name == "lm_head":
                    name = "model.embed_tokens.weight"
                if site.name in schemes:
                    weights[name] = dequantized(weights[name], schemes[site.name])
    return weights


def oracle(folder: Path, config: ModelConfig, schemes: Mapping[str, Scheme]) -> Any:
    transformers = pytest.importorskip("transformers")
    model = transformers.LlamaForCausalLM.from_pretrained(folder).eval()
    weights = dequantized_weights(config, schemes)
    if config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model.load_state_dict(weights)
    return model


@tied
@settings
def test_the_base_is_transformers_on_the_dequantized_weights(
    tmp_path: Path, settings: dict[str, Any], tied: bool
) -> None:
    config = write_checkpoint(tmp_path, tie_word_embeddings=tied, attention_bias=True)
    model = oracle(tmp_path, config, schemes_of(EngineConfig(model="x", **settings)))
    job = Job(prompt_of(70, seed=1), greedy(16, **JOB_FIELDS))
    check(run(make_engine(tmp_path, **settings), [job])[0], model)


@tied
@settings
def test_lora_on_top_is_peft_on_the_dequantized_base(
    tmp_path: Path, settings: dict[str, Any], tied: bool
) -> None:
    peft = pytest.importorskip("peft")
    config = write_checkpoint(tmp_path / "base", tie_word_embeddings=tied)
    targets = LINEARS if tied else (*LINEARS, "embed_tokens", "lm_head")
    folders = {
        name: write_adapter(
            tmp_path / name, config, rank=rank, seed=rank, targets=targets, use_dora=rank > 8
        )
        for name, rank in (("a", 4), ("b", 24))
    }
    engine = make_engine(tmp_path / "base", folders, **settings)
    jobs = [
        Job(prompt_of(30 + 7 * i, seed=i), greedy(12, **JOB_FIELDS), name)
        for i, name in enumerate(("a", None, "b"))
    ]
    for job, output in zip(jobs, run(engine, jobs), strict=True):
        model = oracle(tmp_path / "base", config, schemes_of(engine.config))
        if job.adapter is not None:
            model = peft.PeftModel.from_pretrained(model, folders[str(job.adapter)]).eval()
        check(output, model)


@settings
def test_meta_shards_give_the_bits_of_hugging_face(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    config = write_meta_checkpoint(tmp_path / "meta", shards=2)
    shape = {"rope_scaling": None, "max_position_embeddings": config.max_position_embeddings}
    write_checkpoint(tmp_path / "hf", **shape)
    job = Job(prompt_of(40), greedy(8, logprobs=5))
    outputs = [run(make_engine(tmp_path / n, **settings), [job])[0] for n in ("meta", "hf")]
    assert facts(outputs[0]) == facts(outputs[1])


def test_the_codes_do_not_depend_on_the_dtype_that_is_served(tmp_path: Path) -> None:
    config = write_checkpoint(tmp_path)
    heads = []
    for dtype in (torch.float32, torch.bfloat16):
        model = Llama(config, dtype, {"lm_head": Scheme(4, 32)})
        load_checkpoint(tmp_path, model.parts(), config)
        assert isinstance(model.head.base.weight, mk.PackedWeight)
        heads.append(mk.unpack(model.head.base.weight))
    assert torch.equal(*heads)


@tied
def test_memory_is_counted_in_quantized_bytes(tmp_path: Path, tied: bool) -> None:
    config = write_checkpoint(tmp_path, tie_word_embeddings=tied)
    weights = random_weights(config)
    linears = sum(w.numel() for n, w in weights.items() if "_proj" in n)
    vocab, hidden = config.vocab_size, config.hidden_size
    norms = 4 * sum(w.numel() for w in weights.values() if w.dim() == 1)
    embed = 0 if tied else 4 * vocab * hidden
    rows = sum(w.shape[0] for n, w in weights.items() if "_proj" in n)
    int8 = make_engine(tmp_path, quantization="int8").memory()["base"]
    head = vocab * hidden + 4 * vocab
    assert int8 == linears + 4 * rows + head + embed + norms
    int4 = make_engine(tmp_path, quantization="int4").memory()["base"]
    assert int4 == linears // 2 + linears // 32 * 4 + head + embed + norms
    whole = make_engine(tmp_path).memory()["base"]
    assert whole == 4 * (linears + vocab * hidden) + embed + norms


BIG = {
    "hidden_size": 512,
    "num_heads": 8,
    "num_kv_heads": 8,
    "head_dim": 64,
    "intermediate_size": 1536,
    "vocab_size": 8192,
    "num_layers": 8,
    "tie_word_embeddings": True,
}
MEASURE = """
import os, torch
from multilora.checkpoint.reader import load_checkpoint, read_config
from multilora.model.llama import Llama
from multilora.config.quantization import Scheme
import multilora_kernels as mk
torch.set_num_threads(1)
mk.quantize(torch.ones(64, 64), 4, 32)  # what the first call alone needs

def memory(field):
    for line in open("/proc/self/status"):
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise SystemExit(field + " is unknown")

config = read_config(os.environ["FOLDER"])
before = memory("VmRSS")
schemes = dict.fromkeys(("qkv", "o", "gate_up", "down", "lm_head"), Scheme(4, 32))
model = Llama(config, torch.float32, schemes)
load_checkpoint(os.environ["FOLDER"], model.parts(), config)
print(memory("VmHWM") - before, model.num_bytes)
"""


def test_peak_memory_is_the_quantized_model_and_little_more(
    tmp_path: Path, run_python: Callable[..., str]
) -> None:
    config = write_checkpoint(tmp_path, **BIG)
    weights = random_weights(config).values()
    largest, whole = (4 * f(w.numel() for w in weights) for f in (max, sum))
    words = run_python(MEASURE, OMP_NUM_THREADS="1", FOLDER=str(tmp_path)).split()
    grown, model = (int(word) for word in words)
    assert model < whole / 6
    # One tensor of the file, and what quantising a part of it needs.
    assert grown < model + largest + 30e6, f"{grown / 1e6:.0f} of {whole / 1e6:.0f} MB"
    assert model + largest + 30e6 < 0.6 * whole


@tied
def test_an_adapter_may_bring_the_weights_of_the_base(tmp_path: Path, tied: bool) -> None:
    config = write_checkpoint(tmp_path / "base", tie_word_embeddings=tied)
    weights = load_file(tmp_path / "base" / "model.safetensors")
    embed = weights["model.embed_tokens.weight"]
    head = weights.get("lm_head.weight", embed)
    names = {"model.embed_tokens.weight": embed, "lm_head.weight": head}
    folder = write_adapter(tmp_path / "a", config, targets=("embed_tokens", "q_proj"))
    change_tensors(
        folder, lambda t: t.update({f"base_model.model.{n}": w.clone() for n, w in names.items()})
    )
    settings = {"quantization": "int4", "max_lora_token_rows": 9}
    engine = make_engine(tmp_path / "base", {"a": folder}, **settings)
    assert "a" in engine.adapters
    change_tensors(folder, lambda t: t.update({"base_model.model.lm_head.weight": head.flip(0)}))
    with pytest.raises(AdapterInvalid, match="changes 128 rows of lm_head"):
        engine.load_adapter("b", folder)


def test_a_weight_that_is_not_finite_is_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    name, file = "model.layers.1.mlp.up_proj.weight", tmp_path / "model.safetensors"
    weights = load_file(file)
    weights[name][3, 5] = float("inf")
    save_file(weights, file)
    with pytest.raises(CheckpointError, match=f"{name}: .*infinite"):
        make_engine(tmp_path, quantization="int8")


def test_missing_weights_are_named_before_anything_is_quantized(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.1.mlp.down_proj.weight"]
    save_file(weights, file)
    monkeypatch.setattr(mk, "quantize", lambda *_: pytest.fail("too early"))
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.down_proj"):
        make_engine(tmp_path, quantization="int8")


def test_sizes_need_not_divide(tmp_path: Path) -> None:
    """The last group of a row has what is left: 72 = 64 + 8 columns, 100 = 64 + 36."""
    shape = {"hidden_size": 72, "num_heads": 6, "num_kv_heads": 3, "head_dim": 12}
    config = write_checkpoint(tmp_path, intermediate_size=100, vocab_size=131, **shape)
    assert read_config(tmp_path) == config
    engine = make_engine(tmp_path, quantization="int4", quantization_group_size=64)
    job = Job(prompt_of(40), greedy(8, **JOB_FIELDS))
    check(run(engine, [job])[0], oracle(tmp_path, config, schemes_of(engine.config)))


@tied
def test_weights_that_are_only_packed_give_the_same_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tied: bool
) -> None:
    config = write_checkpoint(tmp_path, tie_word_embeddings=tied)
    monkeypatch.setattr(mk, "worth_packing", lambda _: True)
    engine = make_engine(tmp_path)
    assert isinstance(engine.model.head.base.weight, mk.PackedWeight)
    check(
        run(engine, [Job(prompt_of(70), greedy(8, **JOB_FIELDS))])[0], oracle(tmp_path, config, {})
    )
