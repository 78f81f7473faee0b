"""The ops on CUDA devices, in Triton, which is imported when one of them is first called."""

from .dispatch import NoCudaKernel, TritonMissing, check_device
from .launch_plans import FP8_SM, HEAD_DIMS, CudaTarget, UnsupportedDevice, target_of

__all__ = [
    "FP8_SM",
    "HEAD_DIMS",
    "CudaTarget",
    "NoCudaKernel",
    "TritonMissing",
    "UnsupportedDevice",
    "check_device",
    "target_of",
]
