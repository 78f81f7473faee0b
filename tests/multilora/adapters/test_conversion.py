"""Adapters of MLX-LM and pickled ones: what is written is what they compute."""

from __future__ import annotations

import json
import pickle
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from multilora.adapters.conversion import convert
from multilora.adapters.peft.reader import read_adapter
from multilora.errors import AdapterInvalid
from tests.harness.adapter_folders import CONFIG, write_adapter

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

SIZES = {"self_attn.q_proj": (32, 32), "self_attn.v_proj": (32, 16), "mlp.down_proj": (48, 32)}


def write_mlx(folder: Path, *, kind: str = "lora", rank: int = 4, **parameters: Any) -> Any:
    """As mlx_lm.lora writes it, for the last layer; its tensors."""
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {}
    for name, (in_, out) in SIZES.items():
        path = f"model.layers.1.{name}"
        tensors[f"{path}.lora_a"] = torch.randn(in_, rank, generator=generator)
        tensors[f"{path}.lora_b"] = torch.randn(rank, out, generator=generator)
        if kind == "dora":
            tensors[f"{path}.m"] = torch.rand(out, generator=generator) + 0.5
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapters.safetensors")
    fields = {
        "fine_tune_type": kind,
        "num_layers": 1,
        "lora_parameters": {"rank": rank, "scale": 20.0, "dropout": 0.0, **parameters},
        "model": "mlx-community/some-llama-4bit",
        "iters": 100,
    }
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    return tensors


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_an_mlx_adapter_adds_what_it_did(kind: str, tmp_path: Path) -> None:
    """There: y + scale * (x A) B, by `LoRALinear` of mlx_lm/tuner/lora.py."""
    theirs = write_mlx(tmp_path / "mlx", kind=kind)
    assert convert(tmp_path / "mlx", tmp_path / "out" / "peft") == "an adapter of MLX-LM"
    found = read_adapter(tmp_path / "out" / "peft", CONFIG)
    assert len(found.modules) == len(SIZES)
    x = torch.randn(3, 48, dtype=torch.float64)
    for (site, layer, index), module in found.modules.items():
        name = {"qkv": ("q", "k", "v")}.get(site, (site,))[index]
        path = {"q": "self_attn.q_proj", "v": "self_attn.v_proj", "down": "mlp.down_proj"}[name]
        a, b = (theirs[f"model.layers.{layer}.{path}.lora_{part}"].double() for part in "ab")
        own = module.scale * (x[:, : len(a)] @ module.a.double().T) @ module.b.double().T
        torch.testing.assert_close(own, 20.0 * (x[:, : len(a)] @ a) @ b)
        magnitude = theirs.get(f"model.layers.{layer}.{path}.m")
        assert (module.magnitude is None) == (magnitude is None)
        assert magnitude is None or torch.equal(module.magnitude, magnitude)
    config = json.loads((tmp_path / "out" / "peft" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "mlx-community/some-llama-4bit"


def test_a_scale_may_be_given(tmp_path: Path) -> None:
    write_mlx(tmp_path / "mlx", alpha=16)
    with pytest.raises(AdapterInvalid, match=r"alpha=16 beside scale=20.0.*by --scale"):
        convert(tmp_path / "mlx", tmp_path / "out")
    convert(tmp_path / "mlx", tmp_path / "out", scale=3.0)
    modules = read_adapter(tmp_path / "out", CONFIG).modules.values()
    assert {module.scale for module in modules} == {3.0}
    write_mlx(tmp_path / "mlx", alpha=4)  # both readings are the same
    convert(tmp_path / "mlx", tmp_path / "same")


def test_pickled_weights_are_those_of_the_folder(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a", CONFIG)
    wanted = read_adapter(folder, CONFIG).digest
    weights = folder / "adapter_model.safetensors"
    torch.save(load_file(weights), folder / "adapter_model.bin")
    with pytest.raises(AdapterInvalid, match="can be served as it is"):
        convert(folder, tmp_path / "out")
    weights.unlink()
    with pytest.raises(AdapterInvalid, match="multilora adapters convert"):
        read_adapter(folder, CONFIG)
    assert convert(folder, tmp_path / "out") == "a PEFT adapter with pickled weights"
    assert read_adapter(tmp_path / "out", CONFIG).digest == wanted
    with pytest.raises(AdapterInvalid, match="exists"):
        convert(folder, tmp_path / "out")
    with pytest.raises(AdapterInvalid, match="a scale is for adapters of MLX-LM"):
        convert(folder, tmp_path / "other", scale=1.0)


class Harmful:
    def __reduce__(self) -> Any:
        return print, ("code ran",)


def test_code_in_a_pickle_does_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_adapter(tmp_path / "a", CONFIG)
    (folder / "adapter_model.safetensors").unlink()
    for content in (Harmful(), [1, 2], {"x": 5}):
        torch.save(content, folder / "adapter_model.bin")
        with pytest.raises(AdapterInvalid, match=r"adapter_model\.bin"):
            convert(folder, tmp_path / "out")
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Harmful()))
    with pytest.raises(AdapterInvalid, match="more than plain tensors, or is damaged"):
        convert(folder, tmp_path / "out")
    assert "code ran" not in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "full": ({"fine_tune_type": "full"}, "it is no LoRA"),
    "no parameters": ({"lora_parameters": 5}, "has no lora_parameters"),
    "rank": ({"lora_parameters": {"rank": "8", "scale": 1.0}}, "rank must be a positive integer"),
    "scale": ({"lora_parameters": {"rank": 4}}, "scale must be a finite number"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_adapter_of_mlx_is_refused(name: str, tmp_path: Path) -> None:
    fields, words = BAD[name]
    write_mlx(tmp_path / "mlx")
    path = tmp_path / "mlx" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    with pytest.raises(AdapterInvalid, match=words):
        convert(tmp_path / "mlx", tmp_path / "out")


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        ("model.layers.0.self_attn.q_proj.weight", "unexpected tensor"),
        ("model.layers.0.self_attn.q_proj.m", "unexpected tensor"),
        ("model.embed_tokens.lora_a", "also change a tied head"),
    ],
)
def test_what_peft_has_no_form_for_is_refused(tensor: str, words: str, tmp_path: Path) -> None:
    tensors = write_mlx(tmp_path / "mlx")
    save_file({**tensors, tensor: torch.zeros(4)}, tmp_path / "mlx" / "adapters.safetensors")
    with pytest.raises(AdapterInvalid, match=words):
        convert(tmp_path / "mlx", tmp_path / "out")


def test_a_place_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    write_mlx(tmp_path / "mlx")
    (tmp_path / "file").write_text("")
    with pytest.raises(AdapterInvalid, match="cannot be written"):
        convert(tmp_path / "mlx", tmp_path / "file" / "out")
