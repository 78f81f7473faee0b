"""Which device a name means."""

from __future__ import annotations

import torch

from ..errors import ConfigError
from .cpu import Device
from .cuda import CudaDevice


def open_device(name: str) -> Device:
    """The device that "cpu", "cuda", "cuda:1" or "auto" means; a ConfigError if it is not there."""
    has_cuda = torch.cuda.is_available()
    if name == "cpu" or (name == "auto" and not has_cuda):
        return Device()
    if not has_cuda:
        why = (
            f"torch {torch.__version__} was built without CUDA"
            if torch.version.cuda is None
            else "no NVIDIA GPU or driver was found"
        )
        raise ConfigError(
            f"device {name!r} cannot be used: {why}; use device='cpu', or install torch with CUDA "
            "on a machine with an NVIDIA GPU"
        )
    index = torch.device("cuda" if name == "auto" else name).index or 0
    count = torch.cuda.device_count()
    if index >= count:
        raise ConfigError(f"device {name!r} is not there; this machine has cuda:0..{count - 1}")
    return CudaDevice(index)
