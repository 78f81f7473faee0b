"""Adapter folders: PEFT is the oracle for good ones; bad ones must fail by name, and fast."""

from __future__ import annotations

import dataclasses
import json
import os
import struct
import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

from multilora.adapters.peft.reader import Adapter, read_adapter
from multilora.config.lora_sites import sites_of
from tests.harness.adapter_folders import CONFIG, change_config, change_tensors, write_adapter

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

P = "base_model.model.model.layers."
Q0 = f"{P}0.self_attn.q_proj.lora_A.weight"


# ---- PEFT as the oracle -------------------------------------------------------------------------


def peft_model(*, tied: bool = False, **lora: Any) -> Any:
    """A tiny Llama with a random LoRA on it."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    base = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=CONFIG.hidden_size,
            num_hidden_layers=CONFIG.num_layers,
            num_attention_heads=CONFIG.num_heads,
            num_key_value_heads=CONFIG.num_kv_heads,
            intermediate_size=CONFIG.intermediate_size,
            vocab_size=CONFIG.vocab_size,
            tie_word_embeddings=tied,
        )
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(base, peft.LoraConfig(init_lora_weights=False, **lora))


def save(model: Any, folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    return folder


def deltas_of_peft(model: Any) -> dict[str, torch.Tensor]:
    """The weight change that PEFT applies, by module path."""
    lora = pytest.importorskip("peft.tuners.lora")
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").detach()
        for name, module in model.named_modules()
        if isinstance(module, lora.LoraLayer)
    }


def deltas_of(adapter: Adapter) -> dict[str, torch.Tensor]:
    sites = sites_of(CONFIG)
    found = {}
    for (site, layer, index), module in adapter.modules.items():
        delta = module.scale * module.b.double() @ module.a.double()
        # PEFT gives the change of an embedding as its weight lies: [vocab, hidden].
        found[sites[site].module_path(layer, index)] = delta.T if site == "embed" else delta
    return found


def assert_same_as_peft(model: Any, adapter: Adapter) -> None:
    want, got = deltas_of_peft(model), deltas_of(adapter)
    assert got.keys() == want.keys()
    for path, delta in want.items():
        torch.testing.assert_close(got[path], delta.double(), rtol=1e-6, atol=1e-6)


FEATURES: dict[str, dict[str, Any]] = {
    "default targets": {},
    "rank and alpha": {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj"]},
    "all seven": {"target_modules": list(write_adapter.__kwdefaults__["targets"])},
    "target regex": {"target_modules": r".*\.(0\.self_attn\.(q|k)_proj|1\.mlp\.(up|down)_proj)"},
    "all-linear": {"target_modules": "all-linear"},
    "exclude list": {
        "target_modules": "all-linear",
        "exclude_modules": ["o_proj", "1.mlp.up_proj"],
    },
    "exclude regex": {
        "target_modules": ["q_proj", "o_proj"],
        "exclude_modules": r".*\.1\..*q_proj",
    },
    "one layer": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": 1},
    "layer list": {"target_modules": ["v_proj"], "layers_to_transform": [0, 7]},
    "layers pattern": {
        "target_modules": ["v_proj", "lm_head"],
        "layers_to_transform": [1],
        "layers_pattern": ["blocks", "layer."],
    },
    "full path beats layers": {
        "target_modules": ["model.layers.0.self_attn.q_proj", "v_proj"],
        "layers_to_transform": [1],
    },
    "rank pattern": {
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "rank_pattern": {"1.self_attn.q_proj": 2, "q_proj": 5, r"layers\.[01].mlp.down.proj": 7},
    },
    "alpha pattern": {
        "target_modules": ["q_proj", "v_proj"],
        "alpha_pattern": {"v_proj": 3, "^model.layers.1.self_attn.q_proj": 11},
    },
    "rslora": {"r": 8, "lora_alpha": 16, "use_rslora": True},
    "rslora and patterns": {
        "target_modules": ["q_proj", "gate_proj"],
        "use_rslora": True,
        "rank_pattern": {"gate_proj": 4},
        "alpha_pattern": {"q_proj": 32},
    },
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "lm_head": {"target_modules": ["lm_head"]},
    "embedding, lm_head, patterns": {
        "target_modules": r"(.*\.)?(embed_tokens|lm_head|k_proj)",
        "rank_pattern": {"embed_tokens": 2, "lm_head": 3},
        "alpha_pattern": {"lm_head": 1},
    },
}


@pytest.mark.parametrize("lora", FEATURES.values(), ids=FEATURES.keys())
def test_reads_what_peft_saves(lora: dict[str, Any], tmp_path: Path) -> None:
    model = peft_model(**lora)
    assert_same_as_peft(model, read_adapter(save(model, tmp_path), CONFIG))


def test_reads_a_lora_on_tied_embeddings(tmp_path: Path) -> None:
    model = peft_model(tied=True, target_modules=["embed_tokens", "lm_head"])
    tied = dataclasses.replace(CONFIG, tie_word_embeddings=True)
    assert_same_as_peft(model, read_adapter(save(model, tmp_path), tied))


@pytest.mark.parametrize("target", ["all-linear", "ALL-Linear", None])
def test_expands_targets_that_the_config_only_names(target: str | None, tmp_path: Path) -> None:
    model = peft_model(target_modules=target)
    change_config(save(model, tmp_path), target_modules=target)
    assert_same_as_peft(model, read_adapter(tmp_path, CONFIG))


def test_keeps_the_base_weights_that_peft_saves_beside_an_embedding_lora(tmp_path: Path) -> None:
    model = peft_model(target_modules=["embed_tokens", "lm_head", "q_proj"])
    adapter = read_adapter(save(model, tmp_path), CONFIG)
    base = model.base_model.model
    assert adapter.weights.keys() == {"embed", "lm_head"}
    assert torch.equal(adapter.weights["embed"], base.model.embed_tokens.base_layer.weight)
    assert torch.equal(adapter.weights["lm_head"], base.lm_head.base_layer.weight)


def test_digest_survives_being_saved_again_by_peft_under_another_name(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = peft_model(target_modules=["q_proj", "down_proj"], rank_pattern={"q_proj": 4})
    first = save(model, tmp_path / "first")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = peft.PeftModel.from_pretrained(model.unload(), first, adapter_name="other")
    save(again, tmp_path / "second")
    second = tmp_path / "second" / "other"
    assert read_adapter(first, CONFIG).digest == read_adapter(second, CONFIG).digest


# ---- what an Adapter says -----------------------------------------------------------------------


def test_reads_what_the_factory_writes(tmp_path: Path) -> None:
    folder = write_adapter(
        tmp_path,
        CONFIG,
        rank=4,
        alpha=2,
        rank_pattern={"0.self_attn.k_proj": 9, "down_proj": 1},
        dtype=torch.bfloat16,
    )
    adapter = read_adapter(str(folder), CONFIG)
    assert len(adapter.modules) == 2 * 7
    assert adapter.rank == 9
    assert {site: adapter.rank_at(site) for site in sites_of(CONFIG)} == {
        "embed": 0,
        "qkv": 9,
        "o": 4,
        "gate_up": 4,
        "down": 1,
        "lm_head": 0,
    }
    k = adapter.modules["qkv", 0, 1]
    stored = load_file(folder / "adapter_model.safetensors")
    assert k.scale == 2 / 9
    assert k.a.dtype == torch.bfloat16
    assert torch.equal(k.a, stored[f"{P}0.self_attn.k_proj.lora_A.weight"])
    assert torch.equal(k.b, stored[f"{P}0.self_attn.k_proj.lora_B.weight"])


def test_accepts_names_that_carry_the_adapter_name(tmp_path: Path) -> None:
    targets = ("embed_tokens", "q_proj")
    plain = read_adapter(write_adapter(tmp_path, CONFIG, targets=targets), CONFIG)

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            new = name.replace(".weight", ".default.weight") if "_proj" in name else f"{name}.mine"
            tensors[new] = tensors.pop(name)

    change_tensors(tmp_path, rename)
    assert read_adapter(tmp_path, CONFIG).digest == plain.digest


def test_follows_symbolic_links_to_regular_files(tmp_path: Path) -> None:
    blobs = write_adapter(tmp_path / "blobs", CONFIG)
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(file)
    assert read_adapter(snapshot, CONFIG).digest == read_adapter(blobs, CONFIG).digest


def test_ignores_a_pickle_that_lies_beside_the_safetensors(tmp_path: Path) -> None:
    write_adapter(tmp_path, CONFIG)
    os.mkfifo(tmp_path / "adapter_model.bin")  # to open it would wait for ever
    assert read_adapter(tmp_path, CONFIG).rank == 8


def test_digest_is_of_the_content_alone(tmp_path: Path) -> None:
    digest = read_adapter(write_adapter(tmp_path / "a", CONFIG), CONFIG).digest
    other = write_adapter(tmp_path / "b", CONFIG, base_model_name_or_path="elsewhere")
    raw = json.loads((other / "adapter_config.json").read_text())
    raw["target_modules"].reverse()
    (other / "adapter_config.json").write_text(json.dumps(dict(reversed(raw.items()))))
    reorder_file(other / "adapter_model.safetensors")
    assert read_adapter(other, CONFIG).digest == digest


def reorder_file(path: Path) -> None:
    """Writes the same tensors in another order, with other metadata and padding."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    header.pop("__metadata__")
    new_header, new_body = {}, b""
    for name, entry in sorted(header.items(), reverse=True):
        start, end = entry["data_offsets"]
        new_header[name] = {**entry, "data_offsets": [len(new_body), len(new_body) + end - start]}
        new_body += body[start:end]
    text = json.dumps(new_header).encode() + b"   "
    path.write_bytes(struct.pack("<Q", len(text)) + text + new_body)


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: change_config(folder, lora_alpha=17),
        lambda folder: change_config(folder, use_rslora=True),
        lambda folder: change_config(folder, alpha_pattern={"1.mlp.up_proj": 1}),
        lambda folder: change_tensors(
            folder, lambda t: t[Q0].view(torch.int32)[0, 0].bitwise_xor_(1)
        ),
        lambda folder: change_tensors(folder, lambda t: t.update({Q0: t[Q0].half()})),
        lambda folder: change_tensors(
            folder, lambda t: t.update({f"{P}0.self_attn.v_proj.lora_A.weight": -t[Q0]})
        ),
        lambda folder: change_tensors(
            folder, lambda t: t.update({"base_model.model.lm_head.weight": torch.zeros(64, 32)})
        ),
    ],
    ids=["alpha", "rslora", "alpha pattern", "one bit", "dtype", "one tensor", "base weight"],
)
def test_digest_changes_with_the_content(change: Callable[[Path], Any], tmp_path: Path) -> None:
    before = read_adapter(write_adapter(tmp_path, CONFIG), CONFIG).digest
    change(tmp_path)
    assert read_adapter(tmp_path, CONFIG).digest != before


def test_owns_its_memory(tmp_path: Path) -> None:
    adapter = read_adapter(write_adapter(tmp_path, CONFIG), CONFIG)
    want = adapter.modules["o", 1, 0].a.clone()
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    assert torch.equal(adapter.modules["o", 1, 0].a, want)


def test_what_velora_keeps_for_training_means_nothing(tmp_path: Path) -> None:
    plain = read_adapter(write_adapter(tmp_path, CONFIG), CONFIG)
    change_config(tmp_path, velora_config={"num_groups": 4})
    path = "base_model.model.model.layers.0.self_attn.q_proj"
    change_tensors(tmp_path, lambda t: t.update({f"{path}.lora_velora_embed": torch.ones(3)}))
    assert read_adapter(tmp_path, CONFIG).digest == plain.digest
