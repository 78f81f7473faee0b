"""`make gpu` without a GPU: the GPU's own code on a stand-in, its kernels in Triton's interpreter.

Nothing is left to the CPU's ops: torch's dispatcher gets the functions of `cuda.dispatch` for CPU
tensors, `CudaDevice` runs on `fake_cuda`, graphs are recorded operators. For processes with
TRITON_INTERPRET=1.
"""

from __future__ import annotations

import os
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

import multilora.device.select
import multilora_kernels as mk
from multilora_kernels.library import KERNELS
from tests.harness import fake_cuda

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pytest

FAULT = os.environ.get("MULTILORA_TEST_FAULT", "")
"""What to do wrong, for a rehearsal that must notice it: one of `FAULTS`, or nothing."""
REHEARSED = os.environ.get("MULTILORA_TEST_DEVICE") == "rehearsal"
"""Whether tests/gpu run without a GPU, and therefore on small shapes."""


def install(patch: pytest.MonkeyPatch) -> None:
    """Makes `open_device("cuda")` give the stand-in, and sends the ops of CPU tensors to Triton."""
    from multilora_kernels.testing.interpreter import repair

    repair()
    # The largest step is tried on an empty cache, whatever its memory held before.
    warnings.filterwarnings("ignore", message="All-NaN slice encountered")
    fake_cuda.install(patch)
    patch.setattr(multilora.device.select, "CudaDevice", fake_cuda.FakeCuda)
    patch.setattr(mk, "worth_packing", lambda weight: False)  # as of a weight on a GPU
    patch.setattr(fake_cuda.FakeCuda, "WARM_UPS", 1)
    if FAULT:
        FAULTS[FAULT](patch)
    libraries.append(_register())


def _wrong_page_weights(patch: pytest.MonkeyPatch) -> None:
    """LoRA's expand takes for each page but a slot's first the weight of the page before it."""
    from multilora_kernels.cuda import lora

    expand = lora._expand_

    def wrong(y: Any, u: Any, ids: Any, b_pages: Any, table: mk.Table, *rest: Any) -> None:
        weights = table.page_weights
        weights = torch.cat([weights[:, :1], weights[:, :-1]], 1)
        expand(y, u, ids, b_pages, table._replace(page_weights=weights), *rest)

    patch.setattr(lora, "_expand_", wrong)


FAULTS = {"page weights": _wrong_page_weights}

libraries: list[Any] = []  # that send ops to Triton while they live


@contextmanager
def cpu_ops() -> Iterator[None]:
    """Inside, the ops are the CPU's again, for results to compare with."""
    registered = bool(libraries)
    while libraries:
        libraries.pop()._destroy()
    try:
        yield
    finally:
        if registered:
            libraries.append(_register())


def _register() -> Any:
    library = torch.library.Library("multilora", "IMPL")  # type: ignore[no-untyped-call]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Warning only once for all operators")
        for name, function in KERNELS["CUDA"].items():
            library.impl(name, function, "CPU", allow_override=True)
    return library
