"""What a device cannot do for these settings and this base: said before any weight is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

import multilora_kernels as mk

from ..errors import ConfigError

if TYPE_CHECKING:
    from ..config.engine import EngineConfig
    from ..config.model import ModelConfig
    from .cpu import Device


def check_capabilities(device: Device, config: EngineConfig, shape: ModelConfig) -> None:
    """Raises ConfigError for what the device's ops would refuse in the first step, or later."""
    if device.is_cuda:
        _check_gpu(device, config)
    check_settings(config, shape, is_gpu=device.is_cuda)


def check_settings(config: EngineConfig, shape: ModelConfig, *, is_gpu: bool) -> None:
    """Raises ConfigError for what no device of the kind does."""
    if is_gpu:
        _check_for_gpu(config, shape)
    elif config.kv_cache_dtype.startswith("fp8"):
        raise ConfigError(
            f"kv_cache_dtype={config.kv_cache_dtype!r} needs a GPU; on a CPU use 'int8' or 'auto'"
        )


def _check_gpu(device: Device, config: EngineConfig) -> None:
    try:
        mk.cuda.check_device(device.torch)
    except (mk.cuda.TritonMissing, mk.cuda.UnsupportedDevice) as error:
        raise ConfigError(f"device {config.device!r}: {error}, or use device='cpu'") from error
    sm = mk.cuda.target_of(device.torch).sm
    if config.kv_cache_dtype.startswith("fp8") and sm < mk.cuda.FP8_SM:
        raise ConfigError(
            f"kv_cache_dtype={config.kv_cache_dtype!r} needs a GPU with e4m3 (compute capability "
            f"{mk.cuda.FP8_SM / 10} or higher), this one has {sm / 10}; use 'auto'"
        )


def _check_for_gpu(config: EngineConfig, shape: ModelConfig) -> None:
    if shape.head_dim not in mk.cuda.HEAD_DIMS:
        raise ConfigError(
            f"head_dim {shape.head_dim} of {config.model} works on a CPU only, a GPU takes "
            f"{', '.join(map(str, mk.cuda.HEAD_DIMS))}; use device='cpu'"
        )
    if config.kv_cache_dtype == "int8":
        raise ConfigError("kv_cache_dtype='int8' works on a CPU only; on a GPU use 'fp8' or 'auto'")
    if config.quantization is not None:
        raise ConfigError(
            f"quantization={config.quantization!r} works on device='cpu' only; leave one of them "
            "out"
        )
