"""vLLM's settings; `tests/test_vllm_page.py` goes through all of them."""

from __future__ import annotations

from typing import Any

import pytest

from multilora.config.engine import EngineConfig
from multilora.config.vllm_settings import without_vllms
from multilora.errors import ConfigError


def test_own_settings_pass_and_those_that_ask_for_nothing_go() -> None:
    asked = {"model": "x", "enable_lora": True, "tensor_parallel_size": 1, "seed": 3}
    assert without_vllms(asked, ["model", "seed"]) == {"model": "x", "seed": 3}


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"tensor_parallel_size": 2}, "tensor_parallel_size=2 is not supported: one device"),
        ({"trust_remote_code": True}, "no code of a checkpoint is ever run"),
        ({"enable_lora": False}, "adapters are always on"),
        ({"tensor_parallel_size": True}, "tensor_parallel_size=True"),  # 1, but not meant as 1
        ({"num_gpu_blocks": 3}, r"unknown setting 'num_gpu_blocks'; did you mean num_kv_blocks\?"),
        ({"nonsense": 3}, "unknown setting 'nonsense'; known settings: model, "),
    ],
)
def test_what_asks_for_more_is_told_what_to_do(asked: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        EngineConfig.from_kwargs(model="x", **asked)


@pytest.mark.parametrize(
    ("given", "kept"),
    [("half", "float16"), ("float", "float32"), ("bfloat16", "bfloat16"), ("auto", "auto")],
)
def test_dtypes_by_vllms_names(given: str, kept: str) -> None:
    assert EngineConfig(model="x", dtype=given, lora_dtype=given).dtype == kept
    assert EngineConfig(model="x", lora_dtype=given).lora_dtype == kept


def test_dtypes_of_torch() -> None:
    torch = pytest.importorskip("torch")
    assert EngineConfig(model="x", dtype=torch.float16) == EngineConfig(model="x", dtype="half")
    with pytest.raises(ConfigError, match="dtype must be one of"):
        EngineConfig(model="x", dtype=torch.int8)
