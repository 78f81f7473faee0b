"""Settings: each is checked by name, none is ignored."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields, replace
from typing import Any

import pytest

from multilora.config.engine import EngineConfig
from multilora.errors import ConfigError


def test_an_unknown_setting_lists_the_known_ones() -> None:
    hint = r"'max_lora'; did you mean max_loras\?; known settings: model, "
    with pytest.raises(ConfigError, match=hint):
        EngineConfig.from_kwargs(model="x", max_lora=3)


@pytest.mark.parametrize(
    "wrong",
    [
        *({name: 0} for name in ("block_size", "max_num_seqs", "max_num_batched_tokens")),
        *({name: 0} for name in ("max_loras", "max_lora_rank", "lora_pages", "num_kv_blocks")),
        {"max_logprobs": -2},
        {"generation_config": "none"},
        {"max_num_seqs": True},
        {"max_model_len": -1},
        {"dtype": "int8"},
        {"max_lora_rank": 12},
        {"device": "gpu"},
        {"device": "cuda:"},
        {"load_format": "gguf"},
        {"gpu_memory_utilization": 0},
        {"gpu_memory_utilization": True},
        {"seed": 1.5},
        {"kv_cache_dtype": "int4"},
        {"quantization": "int2"},
        {"quantization": 8},
        {"quantization_group_size": 48, "quantization": "int4"},
        {"quantization_group_size": True, "quantization": "int4"},
        {"quantization_group_size": 32},
    ],
)
def test_a_wrong_setting_is_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        EngineConfig.from_kwargs(model="x", **wrong)


def test_a_config_cannot_be_changed() -> None:
    config = EngineConfig(model="x")
    with pytest.raises(FrozenInstanceError):
        config.seed = 1  # type: ignore[misc]
    assert replace(config, seed=1).seed == 1


def test_an_unknown_load_format_is_refused() -> None:
    with pytest.raises(ConfigError, match="load_format must be one of auto, dummy"):
        EngineConfig(model="x", load_format="gguf")


WORTHLESS = (10**5000, [], {}, b"x", object(), float("nan"))


@pytest.mark.parametrize("name", [field.name for field in fields(EngineConfig)])
def test_any_value_of_any_field_is_taken_or_refused_in_a_line(name: str) -> None:
    for value in (*WORTHLESS, True, 1, "x", None):
        try:
            EngineConfig(**{"model": "x", name: value})
        except ConfigError as error:
            text = str(error)
        else:
            continue
        assert name in text
        assert len(text) < 400
    for value in WORTHLESS:
        if name == "adapter_sources" and value == []:
            continue  # none
        with pytest.raises(ConfigError, match=name):
            EngineConfig(**{"model": "x", name: value})


def test_prefixes_of_sources_have_a_scheme_that_can_be_fetched() -> None:
    config = EngineConfig(model="x", adapter_sources=["hf://me/", "s3://b"])  # type: ignore[arg-type]
    assert config.adapter_sources == ("hf://me/", "s3://b")
    for wrong in ("hf://me/", ["me/"], ["ftp://host/"], [5], {"hf://me": 1}):
        with pytest.raises(ConfigError, match="prefixes that begin with hf://, s3://, gs://"):
            EngineConfig(model="x", adapter_sources=wrong)  # type: ignore[arg-type]
