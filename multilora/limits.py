"""What a device cannot do for these settings and this base: said before any weight is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

import multilora_kernels as mk

from .errors import ConfigError

if TYPE_CHECKING:
    from .config import EngineConfig, ModelConfig
    from .device import Device


def check(device: Device, config: EngineConfig, shape: ModelConfig) -> None:
    """Raises ConfigError for what the device's ops would refuse in the first step, or later."""
    if not device.is_cuda:
        return
    try:
        mk.cuda.check_device(device.torch)
    except (mk.cuda.TritonMissing, mk.plans.UnsupportedDevice) as error:
        raise ConfigError(f"device {config.device!r}: {error}, or use device='cpu'") from error
    if shape.head_dim not in mk.plans.HEAD_DIMS:
        raise ConfigError(
            f"head_dim {shape.head_dim} of {config.model} works on a CPU only, a GPU takes "
            f"{', '.join(map(str, mk.plans.HEAD_DIMS))}; use device='cpu'"
        )
    if config.quantization is not None:
        raise ConfigError(
            f"quantization={config.quantization!r} works on device='cpu' only; leave one of them "
            "out"
        )
