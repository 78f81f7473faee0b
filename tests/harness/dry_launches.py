"""An engine on a GPU's code without a GPU: Triton only specialises launches, the CPU computes.

Each op of ours goes to its Triton launch code first, whose kernels are keyed by Triton and not run
(`multilora_kernels.testing.variants`), and then to the CPU's, whose results count. `CudaDevice`
runs on `fake_cuda`. For processes without TRITON_INTERPRET.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch.utils._python_dispatch import TorchDispatchMode

import multilora.device.select
import multilora_kernels as mk
from multilora_kernels.library import KERNELS
from multilora_kernels.testing.variants import Compiler, Key, recording
from tests.harness import fake_cuda

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pytest


def install(patch: pytest.MonkeyPatch) -> None:
    """Makes `open_device("cuda")` give the stand-in."""
    fake_cuda.install(patch)
    patch.setattr(multilora.device.select, "CudaDevice", fake_cuda.FakeCuda)
    patch.setattr(fake_cuda.FakeCuda, "WARM_UPS", 1)
    patch.setattr(mk, "worth_packing", lambda weight: False)  # as of a weight on a GPU


_WITHOUT_TRITON = ("draw", "top_logprobs")


@contextmanager
def launching(arch: int = 90, compiler: Compiler | None = None) -> Iterator[list[Key]]:
    """Within, ops launch as on a GPU for which nothing is compiled yet; what it would compile."""
    with recording(arch, compiler) as keys, _Launching():  # type: ignore[no-untyped-call]
        yield keys


class _Launching(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        namespace, _, name = func.name().partition("::")
        if namespace == "multilora" and name not in _WITHOUT_TRITON:
            launched = KERNELS["CUDA"][name](*args, **(kwargs or {}))
            if name == "lora_splits":  # the planes are then as many as a GPU's
                return launched
        return func(*args, **(kwargs or {}))
