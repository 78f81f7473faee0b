"""What the tests of CPU kernels vary: torch's threads, the instruction set, C++ or torch."""

from __future__ import annotations

from typing import TYPE_CHECKING
from unittest.mock import patch

import pytest
import torch

from multilora_kernels.cpu import native

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """torch's number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def _use_isa(name: str) -> Iterator[None]:
    if native.LIB is None:
        pytest.skip("the C++ library is not built")
    best = native.select_isa(native.ISAS[-1])
    if native.select_isa(name) != name:
        native.select_isa(best)
        pytest.skip(f"this machine has no {name}")
    yield
    native.select_isa(best)


@pytest.fixture(params=native.ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[None]:
    """Each instruction set that the C++ library has for this machine."""
    yield from _use_isa(request.param)


@pytest.fixture(params=[*native.ISAS, "torch"])
def form(request: pytest.FixtureRequest) -> Iterator[None]:
    """Each of those, and torch without the C++ library."""
    if request.param != "torch":
        yield from _use_isa(request.param)
        return
    with patch.object(native, "LIB", None):
        yield
