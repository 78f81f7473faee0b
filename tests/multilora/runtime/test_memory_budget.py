"""What fits: said before anything is loaded, and the number of KV blocks after."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest

from multilora.config.engine import EngineConfig
from multilora.device.cpu import DeviceMemory
from multilora.errors import ConfigError
from multilora.runtime.memory_budget import (
    DEFAULT_KV_BYTES,
    check_device,
    check_host,
    host_blocks,
    num_blocks,
    ran_out,
)
from multilora.runtime.memory_needs import MemoryNeeds

GB = 10**9
NEEDS = MemoryNeeds(
    base=16 * GB,
    activations=GB,
    rank_pages=5 * GB,
    graphs=2 * GB,
    block=2**21,
    min_blocks=8192,
    max_blocks=10**6,
)
GPU = DeviceMemory(free=63 * GB, total=80 * GB)  # 16 GB of weights, 1 GB of others
EMPTY = DeviceMemory(free=79 * GB, total=80 * GB)


def config(**settings: Any) -> EngineConfig:
    return EngineConfig(model="some-model", **settings)


# How many blocks ----------------------------------------------------------------------------------


def test_a_gpu_is_filled_to_the_share_that_is_allowed() -> None:
    room = 72 * GB - 17 * GB - GB - 5 * GB - 2 * GB
    assert num_blocks(config(), NEEDS, GPU) == room // 2**21
    assert num_blocks(config(), replace(NEEDS, graphs=0), GPU) == (room + 2 * GB) // 2**21
    more = num_blocks(config(gpu_memory_utilization=0.95), NEEDS, GPU)
    assert more == (room + 4 * GB) // 2**21


def test_no_more_than_full_requests_need() -> None:
    assert num_blocks(config(), replace(NEEDS, min_blocks=10, max_blocks=100), GPU) == 100


def test_one_full_request_must_fit() -> None:
    room = 72 * GB - 17 * GB - GB - 5 * GB - 2 * GB
    fits = room // 2**21
    assert num_blocks(config(), replace(NEEDS, min_blocks=fits), GPU) == fits
    with pytest.raises(ConfigError, match=f"Lower max_model_len to {16 * fits}, or lora_pages"):
        num_blocks(config(), replace(NEEDS, min_blocks=fits + 1), GPU)


def test_blocks_that_were_asked_for_are_given_or_refused() -> None:
    assert num_blocks(config(num_kv_blocks=3), replace(NEEDS, min_blocks=3), GPU) == 3
    with pytest.raises(ConfigError, match="Lower num_kv_blocks to 22411, or lora_pages"):
        num_blocks(config(num_kv_blocks=40_000), replace(NEEDS, min_blocks=40_000), GPU)


def test_what_the_free_memory_of_a_host_would_hold() -> None:
    assert host_blocks(NEEDS, GPU) == (63 - 16 - 1 - 5 - 2) * GB // 2**21
    assert host_blocks(NEEDS, DeviceMemory(free=24 * GB, total=80 * GB)) == 0
    assert host_blocks(NEEDS, DeviceMemory(free=20 * GB, total=80 * GB)) == 0


def test_on_a_cpu_memory_is_virtual() -> None:
    assert num_blocks(config(), NEEDS, None) == DEFAULT_KV_BYTES // 2**21
    assert num_blocks(config(), replace(NEEDS, max_blocks=7), None) == 7
    assert num_blocks(config(num_kv_blocks=9), NEEDS, None) == 9
    assert num_blocks(config(), replace(NEEDS, block=2**40), None) == 1


def test_the_result_is_said_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "multilora"):
        num_blocks(config(num_kv_blocks=100), replace(NEEDS, min_blocks=100), GPU)
    assert caplog.messages == [
        "memory: base 16.00 GB, activations 1.00 GB, rank pages 5.00 GB, graphs 2.00 GB, "
        "100 KV blocks of 16 tokens 0.21 GB"
    ]


# What is said of an engine that does not fit ------------------------------------------------------


def refusal(needs: MemoryNeeds, memory: DeviceMemory, **settings: Any) -> str:
    with pytest.raises(ConfigError) as found:
        check_device(config(**settings), needs, memory)
    return str(found.value)


def test_what_fits_is_not_refused() -> None:
    needs = 16 * GB + GB + 5 * GB + 2 * GB + 8192 * 2**21
    check_device(config(), NEEDS, DeviceMemory(free=80 * GB, total=80 * GB))
    exact = DeviceMemory(free=needs, total=needs)
    check_device(config(gpu_memory_utilization=1), NEEDS, exact)
    refusal(NEEDS, replace(exact, free=needs - 1), gpu_memory_utilization=1)


def test_every_number_is_said_with_its_setting() -> None:
    assert refusal(NEEDS, EMPTY, gpu_memory_utilization=0.5) == (
        "some-model needs 41.18 GB of the GPU: weights 16.00 GB, "
        "rank pages 5.00 GB (lora_pages=64), "
        "KV blocks 17.18 GB (8192 for 131072 tokens: one request of max_model_len), "
        "activations 1.00 GB (max_num_batched_tokens=512, max_num_seqs=64, max_lora_rank=512), "
        "graphs 2.00 GB (max_num_seqs=64); "
        "it may take 39.00 GB: 80.00 GB x gpu_memory_utilization=0.5, less 1.00 GB in use. "
        # 15 GB are left
        "Lower max_model_len to 114432, or lora_pages, max_num_batched_tokens, max_num_seqs or "
        "max_lora_rank, or raise gpu_memory_utilization"
    )


def test_the_cure_follows_from_what_is_too_large() -> None:
    assert refusal(NEEDS, EMPTY, gpu_memory_utilization=0.3).endswith(
        ". Lower lora_pages, max_num_batched_tokens, max_num_seqs or max_lora_rank, or raise "
        "gpu_memory_utilization"
    )
    larger = ". The weights alone do not fit: {}use a GPU with more memory, a narrower dtype, or "
    larger += "device='cpu' with quantization='int8' or 'int4'"
    share = larger.format("raise gpu_memory_utilization, ")
    assert refusal(NEEDS, EMPTY, gpu_memory_utilization=0.2).endswith(share)
    assert refusal(replace(NEEDS, base=80 * GB), EMPTY).endswith(larger.format(""))


def test_memory_that_ran_out_is_said_with_what_was_expected() -> None:
    error = RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total ...")
    found = ran_out(config(), NEEDS, EMPTY, error)
    assert isinstance(found, ConfigError)
    text = str(found)
    assert text.startswith(
        "the GPU's memory ran out (CUDA out of memory). some-model needs 41.18 GB of the GPU: "
    )
    assert "less 1.00 GB in use. See whether another process" in text
    assert text.endswith("lower gpu_memory_utilization, max_num_seqs or max_num_batched_tokens")


# A CPU --------------------------------------------------------------------------------------------


def test_weights_that_a_machine_cannot_hold_are_refused() -> None:
    small = DeviceMemory(free=8 * GB, total=15 * GB)
    with pytest.raises(
        ConfigError,
        match=r"weights of some-model need 16.00 GB, and this machine has 15.00 GB; "
        r"set quantization='int8' or 'int4', or use a machine",
    ):
        check_host(config(), NEEDS, small)
    with pytest.raises(ConfigError, match=r"has 15.00 GB; use a machine with more memory"):
        check_host(config(quantization="int8"), NEEDS, small)


def test_settings_that_a_machine_cannot_hold_are_refused() -> None:
    host = DeviceMemory(free=64 * GB, total=64 * GB)
    check_host(config(num_kv_blocks=30_000), NEEDS, host)
    with pytest.raises(ConfigError, match=r"40000 KV blocks need 83.89 GB.*lower num_kv_blocks"):
        check_host(config(num_kv_blocks=40_000), NEEDS, host)
    with pytest.raises(ConfigError, match=r"max_num_seqs=60000 requests.*this machine has 64.00"):
        check_host(config(max_num_seqs=60_000), replace(NEEDS, max_blocks=10**9), host)
    with pytest.raises(ConfigError, match=r"max_loras=65000 slots of max_lora_rank=65000 need"):
        check_host(
            config(max_loras=65_000, max_lora_rank=65_000), NEEDS, replace(host, total=20 * GB)
        )


def test_little_free_memory_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    check_host(config(), NEEDS, DeviceMemory(free=16 * GB, total=32 * GB))
    assert not caplog.messages
    check_host(config(), NEEDS, DeviceMemory(free=8 * GB, total=32 * GB))
    assert caplog.messages == [
        "the weights of some-model need 16.00 GB, and 8.00 GB are free here: the system may end "
        "the process; set quantization='int8' or 'int4', or use a machine with more memory"
    ]
