"""Kernels in Triton's interpreter, repaired: `make test-triton`.

Triton reads TRITON_INTERPRET when it is first imported, so these tests are a process of their own.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    from multilora_kernels.testing.interpreter import repair

    repair()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if INTERPRETED:
        return
    skip = pytest.mark.skip(reason="needs TRITON_INTERPRET=1: `make test-triton`")
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(skip)
