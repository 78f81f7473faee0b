"""Tests that need a GPU. `MULTILORA_TEST_DEVICE=cpu` runs them on a CPU, as a rehearsal."""

from __future__ import annotations

import os

import pytest
import torch

from multilora.device import Device, open_device


@pytest.fixture(scope="session")
def device() -> Device:
    name = os.environ.get("MULTILORA_TEST_DEVICE", "cuda")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no GPU; MULTILORA_TEST_DEVICE=cpu rehearses on the CPU")
    return open_device(name)
