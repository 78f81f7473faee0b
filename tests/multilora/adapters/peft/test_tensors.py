"""An adapter in memory is the one that its folder holds, and is refused for the same reasons."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from multilora.adapters.peft.reader import adapter_from_tensors, read_adapter
from multilora.adapters.peft.weights import MAX_TENSORS
from multilora.errors import AdapterInvalid, AdapterTooLarge
from tests.harness.adapter_folders import CONFIG, LINEARS, write_adapter
from tests.harness.model_folders import write_checkpoint

Parts = tuple[dict[str, Any], dict[str, torch.Tensor]]


@pytest.fixture
def parts(tmp_path: Path) -> Parts:
    folder = write_adapter(tmp_path, CONFIG, alora_invocation_tokens=[3, 4], lora_bias=True)
    config = json.loads((folder / "adapter_config.json").read_text())
    return config, load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_it_is_the_adapter_of_its_folder(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path, CONFIG, use_dora=True, dtype=dtype, targets=LINEARS[:3])
    config = json.loads((folder / "adapter_config.json").read_text())
    config["target_modules"] = set(config["target_modules"])  # as a LoraConfig has them
    tensors = load_file(folder / "adapter_model.safetensors")
    strided = {name: t.repeat_interleave(2, -1)[..., ::2] for name, t in tensors.items()}
    read = read_adapter(folder, CONFIG)
    for given in (tensors, strided):
        found = adapter_from_tensors(config, given, CONFIG)
        assert (found.digest, found.rank) == (read.digest, read.rank)
        for key, module in read.modules.items():
            assert torch.equal(found.modules[key].a, module.a)
            assert torch.equal(found.modules[key].b, module.b)


def test_the_tensors_are_copied(parts: Parts) -> None:
    config, tensors = parts
    found = adapter_from_tensors(config, tensors, CONFIG)
    before = {key: module.a.clone() for key, module in found.modules.items()}
    for tensor in tensors.values():
        tensor.zero_()
    assert all(torch.equal(found.modules[key].a, a) for key, a in before.items())


def test_pefts_own_config_and_state_are_taken(tmp_path: Path) -> None:
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    config = write_checkpoint(tmp_path / "base")
    base = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    settings = peft.LoraConfig(
        r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(base, settings)
    model.save_pretrained(tmp_path / "saved")
    state = peft.get_peft_model_state_dict(model)
    found = adapter_from_tensors(model.peft_config["default"].to_dict(), state, config)
    assert found.digest == read_adapter(tmp_path / "saved", config).digest


def spoilt(tensors: dict[str, torch.Tensor], value: Any) -> dict[str, Any]:
    return {**tensors, next(iter(tensors)): value}


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (5, "must name a tensor, not 5"),
        (torch.zeros(4, dtype=torch.int64), "has dtype torch.int64"),
        (torch.zeros(4, 4).to_sparse(), "layout torch.sparse_coo"),
        (torch.zeros(0, 4), "has the empty shape"),
        (torch.tensor(1.0), "has the empty shape"),
        (torch.zeros(3, 3), "has shape"),
        (torch.full((8, 48), float("nan")), "holds NaN"),
        (torch.zeros(1).expand(2**31), "above the limit"),
    ],
)
def test_what_no_file_could_hold_is_refused(value: Any, words: str, parts: Parts) -> None:
    config, tensors = parts
    with pytest.raises(AdapterInvalid, match=words):
        adapter_from_tensors(config, spoilt(tensors, value), CONFIG)


def test_other_mistakes_are_those_of_a_folder(parts: Parts) -> None:
    config, tensors = parts
    with pytest.raises(AdapterInvalid, match="use_qalora"):
        adapter_from_tensors({**config, "use_qalora": True}, tensors, CONFIG)
    with pytest.raises(AdapterInvalid, match="tensors are missing"):
        adapter_from_tensors(config, dict(list(tensors.items())[1:]), CONFIG)
    with pytest.raises(AdapterInvalid, match="is no JSON"):
        adapter_from_tensors({**config, "x": object()}, tensors, CONFIG)
    with pytest.raises(AdapterInvalid, match="more than 20000 tensors"):
        adapter_from_tensors(config, dict.fromkeys(map(str, range(MAX_TENSORS + 1))), CONFIG)  # type: ignore[arg-type]
    with pytest.raises(AdapterTooLarge):
        adapter_from_tensors(config, tensors, CONFIG, max_rank=4)
