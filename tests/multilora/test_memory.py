"""How many KV blocks fit."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest

from multilora.config.engine import EngineConfig
from multilora.device.cpu import DeviceMemory
from multilora.errors import ConfigError
from multilora.runtime.memory_budget import DEFAULT_KV_BYTES, GRAPH_BYTES, MemoryNeeds, num_blocks

GB = 10**9
NEEDS = MemoryNeeds(base=16 * GB, activations=GB, rank_pages=5 * GB, block=2**21, max_blocks=10**6)
GPU = DeviceMemory(free=63 * GB, total=80 * GB)  # 16 GB of weights, 1 GB of others


def config(**settings: Any) -> EngineConfig:
    return EngineConfig(model="none", **settings)


def test_a_gpu_is_filled_to_the_share_that_is_allowed() -> None:
    room = 72 * GB - 17 * GB - GB - 5 * GB
    assert num_blocks(config(), NEEDS, GPU) == (room - GRAPH_BYTES) // 2**21
    assert num_blocks(config(enforce_eager=True), NEEDS, GPU) == room // 2**21
    half = num_blocks(config(gpu_memory_utilization=0.5), NEEDS, GPU)
    assert half == (room - 32 * GB - GRAPH_BYTES) // 2**21


def test_no_more_than_full_requests_need() -> None:
    assert num_blocks(config(), replace(NEEDS, max_blocks=100), GPU) == 100


@pytest.mark.parametrize(
    "settings", [{"num_kv_blocks": 40_000}, {"gpu_memory_utilization": 0.25}], ids=str
)
def test_what_does_not_fit_says_what_takes_the_memory(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"rank pages.*lower lora_pages.*or raise gpu_memory"):
        num_blocks(config(**settings), NEEDS, GPU)


def test_on_a_cpu_memory_is_virtual() -> None:
    assert num_blocks(config(), NEEDS, None) == DEFAULT_KV_BYTES // 2**21
    assert num_blocks(config(), replace(NEEDS, max_blocks=7), None) == 7
    assert num_blocks(config(num_kv_blocks=9), NEEDS, None) == 9
    assert num_blocks(config(), replace(NEEDS, block=2**40), None) == 1


def test_the_result_is_said_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "multilora"):
        num_blocks(config(num_kv_blocks=100), NEEDS, GPU)
    assert caplog.messages == [
        "memory: base 16.00 GB, activations 1.00 GB, rank pages 5.00 GB, "
        "100 KV blocks of 16 tokens 0.21 GB"
    ]
