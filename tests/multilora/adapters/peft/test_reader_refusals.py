"""Adapters that do not fit their config or the base: refused by name."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest
import torch

from multilora.adapters.peft import reader
from multilora.adapters.peft.reader import read_adapter
from multilora.errors import AdapterInvalid, AdapterTooLarge
from tests.harness.adapter_folders import CONFIG, change_config, change_tensors, write_adapter
from tests.harness.refused_adapters import assert_refused

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

P = "base_model.model.model.layers."
Q0 = f"{P}0.self_attn.q_proj.lora_A.weight"


def drop(*names: str) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda tensors: [tensors.pop(name) for name in names]


def put(name: str, tensor: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda tensors: tensors.update({name: tensor})


def poke(name: str, value: float, at: int = 0) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda tensors: tensors[name].view(-1)[at : at + 1].fill_(value)


BAD_TENSORS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "A missing": (drop(Q0), "missing: 'model.layers.0.self_attn.q_proj.lora_A.weight'"),
    "B missing": (drop(Q0.replace("_A", "_B")), "q_proj.lora_B.weight'"),
    "all missing": (lambda tensors: tensors.clear(), "and 25 more"),
    "untargeted module": (
        put("base_model.model.lm_head.lora_A.weight", torch.zeros(8, 32)),
        "does not target its module",
    ),
    "layer above": (
        put(f"{P}2.self_attn.q_proj.lora_A.weight", torch.zeros(8, 32)),
        "has no layer 2; its last is 1",
    ),
    "layer far above": (
        put(f"{P}{'9' * 5000}.x.lora_A.weight", torch.zeros(1)),
        "has no layer 999",
    ),
    "no such module": (
        put(f"{P}0.self_attn.w_pack.lora_A.weight", torch.zeros(8, 32)),
        "no such module",
    ),
    "not LoRA": (put(f"{P}0.input_layernorm.weight", torch.zeros(32)), "modules_to_save"),
    "no prefix": (put("model.q_proj.lora_A.weight", torch.zeros(8, 32)), "PEFT's names begin with"),
    "embedding names on a linear": (
        put(f"{P}0.self_attn.q_proj.lora_embedding_A", torch.zeros(8, 32)),
        "in this way",
    ),
    "DoRA": (
        put(Q0.replace("A.weight", "magnitude_vector"), torch.zeros(32)),
        "the config does not say use_dora",
    ),
    "lora_bias": (put(Q0.replace("A.weight", "B.bias"), torch.zeros(32)), "does not say lora_bias"),
    "bias": (put(Q0.replace("lora_A.weight", "bias"), torch.zeros(32)), "was not trained, or the"),
    "two adapters": (put(Q0.replace("A.", "A.default."), torch.zeros(8, 32)), "are one weight"),
    "wrong input": (put(Q0, torch.zeros(8, 31)), "has shape [8, 31], but the base model"),
    "wrong output": (put(Q0.replace("_A", "_B"), torch.zeros(33, 8)), "need [32, 8]"),
    "wrong rank": (put(Q0, torch.zeros(4, 32)), "has shape [4, 32], but the base model and the"),
    "wrong dimensions": (put(Q0, torch.zeros(8, 32, 1)), "has shape [8, 32, 1]"),
    "scalar": (put(Q0, torch.zeros(())), "shape []"),
    "empty": (put(Q0, torch.zeros(0, 32)), "shape [0, 32]"),
    "NaN": (poke(Q0, float("nan")), f"'{Q0}' holds NaN or infinite"),
    "infinity": (poke(Q0, float("-inf")), f"'{Q0}' holds NaN or infinite"),
    "integers": (put(Q0, torch.zeros(8, 32, dtype=torch.int32)), "has dtype 'I32'"),
    "float64": (
        put(Q0, torch.zeros(8, 32, dtype=torch.float64)),
        "save it as one of F32, F16, BF16",
    ),
    "resized vocabulary": (
        put("base_model.model.model.embed_tokens.weight", torch.zeros(65, 32)),
        "resized vocabulary",
    ),
    "base weight twice": (
        lambda tensors: tensors.update(
            {
                f"base_model.model.lm_head.{x}weight": torch.zeros(64, 32)
                for x in ("", "base_layer.")
            }
        ),
        "are one weight",
    ),
}


@pytest.mark.parametrize(("change", "fragment"), BAD_TENSORS.values(), ids=BAD_TENSORS.keys())
def test_refuses_tensors_that_do_not_fit(
    change: Callable[[dict[str, torch.Tensor]], Any], fragment: str, tmp_path: Path
) -> None:
    change_tensors(write_adapter(tmp_path, CONFIG), change)
    assert_refused(tmp_path, fragment)


@pytest.mark.parametrize("fields", [{"r": 513}, {"rank_pattern": {"up_proj": 10**4000}}])
def test_says_how_to_serve_a_rank_above_the_limit(fields: dict[str, Any], tmp_path: Path) -> None:
    change_config(write_adapter(tmp_path, CONFIG), **fields)
    assert_refused(tmp_path, "restart with max_lora_rank>=", AdapterTooLarge)


def test_a_large_rank_is_no_matter_where_nothing_uses_it(tmp_path: Path) -> None:
    write_adapter(tmp_path, CONFIG, rank=4)
    change_config(tmp_path, r=10**9, rank_pattern={"_proj": 10**9, ".*_proj": 4})
    assert read_adapter(tmp_path, CONFIG, max_rank=4).rank == 4
    with pytest.raises(AdapterTooLarge, match=r"rank 4, above max_lora_rank=3; .*>=8"):
        read_adapter(tmp_path, CONFIG, max_rank=3)


def test_weights_that_are_written_to_while_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of each version would have a digest of its own, and nonsense for answers."""
    write_adapter(tmp_path, CONFIG)
    weights = tmp_path / "adapter_model.safetensors"
    data, read = weights.read_bytes(), reader.read_weights

    def read_beside_a_writer(*args: Any) -> Any:
        found = read(*args)
        change()
        return found

    def in_place() -> None:
        with weights.open("r+b") as file:
            file.seek(len(data) // 2)
            file.write(data[len(data) // 2 :])
        os.utime(weights, ns=(0, weights.stat().st_mtime_ns + 1))  # later than any clock's step

    def by_name() -> None:
        (tmp_path / "new").write_bytes(data)
        (tmp_path / "new").replace(weights)

    monkeypatch.setattr(reader, "read_weights", read_beside_a_writer)
    change = by_name
    read_adapter(tmp_path, CONFIG)
    change = in_place
    with pytest.raises(AdapterInvalid, match="was written to while it was read"):
        read_adapter(tmp_path, CONFIG)
