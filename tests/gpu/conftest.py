"""Tests that need a GPU; with MULTILORA_TEST_DEVICE=rehearsal they do without: see `rehearsal`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from multilora.device.select import open_device
from tests.harness import gpu_rehearsal

if TYPE_CHECKING:
    from collections.abc import Iterator

    from multilora.device.cpu import Device


@pytest.fixture(scope="session")
def device() -> Iterator[Device]:
    with pytest.MonkeyPatch.context() as patch:
        if gpu_rehearsal.REHEARSED and not gpu_rehearsal.libraries:
            gpu_rehearsal.install(patch)
        if not torch.cuda.is_available():
            pytest.skip("there is no GPU; `make gpu-rehearsal` does without")
        yield open_device("cuda")
