"""KV memory is taken as tokens come, not reserved for the longest request that might."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import pytest
import torch

from multilora.model.kv_cache import KVCache
from tests.harness.model_folders import write_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

# Serves one prompt of each length and prints the bytes of KV pages that are in memory after each.
# A process of its own, since in this one torch.empty writes to what it gives.
SERVE = """
import ctypes, json, os
from multilora import Engine, EngineConfig, SamplingParams

PAGE = os.sysconf("SC_PAGESIZE")
LENGTHS = json.loads(os.environ["LENGTHS"])

def resident(tensor):
    start = tensor.data_ptr() // PAGE * PAGE
    size = tensor.data_ptr() + tensor.nbytes - start
    pages = (ctypes.c_ubyte * -(-size // PAGE))()
    assert ctypes.CDLL(None).mincore(ctypes.c_void_p(start), ctypes.c_size_t(size), pages) == 0
    return sum(page & 1 for page in pages) * PAGE

max_model_len = int(os.environ["MAX_MODEL_LEN"])
engine = Engine(EngineConfig(
    model=os.environ["BASE"], skip_tokenizer_init=True, max_model_len=max_model_len,
    num_kv_blocks=max_model_len // 16, max_num_batched_tokens=256, enable_prefix_caching=False,
))
cache, found = engine.runner.cache, []
for length in LENGTHS:
    engine.add_request([5] * length, SamplingParams(max_tokens=1))
    while engine.has_work:
        engine.step()
    found.append(resident(cache.k) + resident(cache.v))
print(json.dumps([cache.k.nbytes + cache.v.nbytes, *found]))
"""
LENGTHS = [256, 2048]
HUGE_PAGE = 2 << 20  # the kernel may back a touched byte by as much


@pytest.mark.seconds
@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel with mincore")
def test_memory_grows_with_the_tokens_held_not_with_the_longest_request_allowed(
    tmp_path: Path, run_python: Callable[..., str]
) -> None:
    config = write_checkpoint(
        tmp_path, num_kv_heads=4, head_dim=128, max_position_embeddings=1 << 17
    )
    regions = 2 * config.num_layers  # K and V of each layer lie apart
    slack = regions * 2 * HUGE_PAGE  # a region's tokens begin and end inside a huge page
    for max_model_len in (1 << 12, 1 << 17):
        serve = {"BASE": str(tmp_path), "MAX_MODEL_LEN": str(max_model_len)}
        reserved, *found = json.loads(run_python(SERVE, LENGTHS=json.dumps(LENGTHS), **serve))
        token = KVCache.block_bytes(config, 1, torch.float32)
        assert reserved == max_model_len * token
        for length, held in zip(LENGTHS, found, strict=True):
            assert 0 < held <= length * token + slack, (max_model_len, length)
        assert found[1] >= LENGTHS[1] * token
    assert reserved > 20 * (LENGTHS[1] * token + slack)
