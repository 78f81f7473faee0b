"""What a GPU cannot do is said at start-up, before a weight is read."""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from multilora.config.engine import EngineConfig
from multilora.device.capabilities import check_capabilities, check_settings
from multilora.device.select import open_device
from multilora.engine import builder
from multilora.errors import ConfigError
from multilora_kernels.cuda import dispatch, launch_plans
from tests.harness.fake_cuda import FakeCuda, install
from tests.harness.model_folders import TINY, write_checkpoint
from tests.harness.tiny_engines import greedy, make_engine, prompt_of

if TYPE_CHECKING:
    from pathlib import Path

TOO_NARROW = {"hidden_size": 96, "num_heads": 4, "num_kv_heads": 2, "head_dim": 24}


@pytest.fixture(autouse=True)
def _gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    launch_plans.target_of.cache_clear()
    monkeypatch.setattr(builder, "open_device", lambda name: FakeCuda())
    monkeypatch.setattr(builder, "load_checkpoint", lambda *_: pytest.fail("too late"))


def refuse(monkeypatch: pytest.MonkeyPatch, version: str | None, capability: int) -> None:
    """A triton of that version (None = none) and a GPU of that compute capability."""

    def find(name: str) -> str:
        if version is None:
            raise PackageNotFoundError(name)
        return version

    monkeypatch.setattr(dispatch, "version", find)
    card = SimpleNamespace(major=capability // 10, minor=capability % 10, multi_processor_count=108)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: card)


@pytest.mark.parametrize(
    ("version", "capability", "match"),
    [
        (None, 90, r"need triton 3\.6 or newer, none is installed: pip install 'triton>=3\.6'"),
        ("3.4.0", 90, r"triton 3\.6 or newer, 3\.4\.0 is installed: .*, or use device='cpu'"),
        ("3.6.0", 75, r"'cuda:0'.* compute capability 7\.5, the kernels need 8\.0"),
    ],
)
def test_an_old_triton_or_gpu(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    version: str | None,
    capability: int,
    match: str,
) -> None:
    write_checkpoint(tmp_path)
    refuse(monkeypatch, version, capability)
    with pytest.raises(ConfigError, match=match):
        make_engine(tmp_path, device="cuda:0")


@pytest.mark.parametrize(
    ("shape", "settings", "match"),
    [
        (TOO_NARROW, {}, r"head_dim 24 of .* a GPU takes 16, 32, 64, 128; use device='cpu'"),
        ({}, {"kv_cache_dtype": "int8"}, r"'int8' works on a CPU only; on a GPU use 'fp8'"),
        ({}, {"quantization": "int4"}, r"quantization='int4' works on device='cpu' only"),
    ],
)
def test_a_base_that_the_kernels_do_not_take(
    tmp_path: Path, shape: dict[str, Any], settings: dict[str, Any], match: str
) -> None:
    write_checkpoint(tmp_path, **shape)
    with pytest.raises(ConfigError, match=match):
        make_engine(tmp_path, device="cuda", **settings)


def test_a_gpu_without_e4m3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path)
    refuse(monkeypatch, "3.6.0", 80)
    with pytest.raises(ConfigError, match=r"'fp8' needs a GPU with e4m3 .* has 8\.0; use 'auto'"):
        make_engine(tmp_path, device="cuda", kv_cache_dtype="fp8")


def test_a_cpu_without_e4m3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path)
    monkeypatch.setattr(builder, "open_device", open_device)
    with pytest.raises(ConfigError, match="'fp8_e4m3' needs a GPU; on a CPU use 'int8'"):
        make_engine(tmp_path, kv_cache_dtype="fp8_e4m3")


def test_a_cpu_takes_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path, **TOO_NARROW)
    monkeypatch.undo()
    engine = make_engine(tmp_path, quantization="int8")
    engine.add_request(prompt_of(9), greedy(2))
    while engine.has_work:
        engine.step()


@pytest.mark.parametrize("capability", [89, 90, 100])
def test_a_gpu_with_e4m3_takes_it(monkeypatch: pytest.MonkeyPatch, capability: int) -> None:
    refuse(monkeypatch, "3.6.0", capability)
    config = EngineConfig(model="x", device="cuda", kv_cache_dtype="fp8")
    check_capabilities(FakeCuda(), config, replace(TINY, head_dim=64))


@pytest.mark.parametrize(
    ("settings", "is_gpu"),
    [
        ({"kv_cache_dtype": "fp8"}, False),
        ({"kv_cache_dtype": "int8"}, True),
        ({"quantization": "int8"}, True),
    ],
)
def test_what_no_device_of_the_kind_does_is_said_without_one(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], is_gpu: bool
) -> None:
    monkeypatch.setattr(launch_plans, "target_of", lambda *_: pytest.fail("asked a GPU"))
    config, shape = EngineConfig(model="x", **settings), replace(TINY, head_dim=64)
    with pytest.raises(ConfigError, match=next(iter(settings))):
        check_settings(config, shape, is_gpu=is_gpu)
    check_settings(config, shape, is_gpu=not is_gpu)
