"""Adapters come and go for as long as a server runs: what is gone takes no memory."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import pytest
import torch

from tests.harness.adapter_folders import change_tensors, write_adapter
from tests.harness.model_folders import write_checkpoint
from tests.harness.tiny_engines import drain, greedy, make_engine

pytestmark = pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="the C library is not glibc"
)
WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_heads": 8, "num_kv_heads": 4}


def resident() -> float:
    """MiB of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.seconds
def test_loading_and_unloading_for_ever_takes_no_memory(tmp_path: Path) -> None:
    shape = write_checkpoint(tmp_path / "base", head_dim=32, **WIDE)
    for seed in range(2):
        write_adapter(tmp_path / f"{seed}", shape, seed=seed, rank=64)  # 2 MB
    engine = make_engine(tmp_path / "base")

    def rounds(count: int) -> None:
        for i in range(count):
            engine.load_adapter("x", tmp_path / f"{i % 2}")
            engine.add_request([5, 6, 7], greedy(2), adapter="x")
            drain(engine)
            engine.unload_adapter("x")

    rounds(50)
    before = resident()
    rounds(200)
    assert resident() - before < 2, "1 MiB for each 100 loads"


@pytest.mark.seconds
def test_what_many_adapters_took_goes_back_to_the_system(tmp_path: Path) -> None:
    shape = write_checkpoint(tmp_path / "base", head_dim=32, **WIDE)
    folder = tmp_path / "a"
    write_adapter(folder, shape, rank=64)
    engine = make_engine(tmp_path / "base")

    def change(tensors: dict[str, torch.Tensor]) -> None:
        name = min(tensors)
        tensors[name] = tensors[name] + 0.001

    before = resident()
    for i in range(60):
        change_tensors(folder, change)
        engine.load_adapter(f"{i}", folder)
    loaded = resident() - before
    assert loaded > 100
    for i in range(60):
        engine.unload_adapter(f"{i}")
    assert resident() - before < loaded / 4
