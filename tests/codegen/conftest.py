"""What Triton compiles kernels to, without a GPU: `make test-codegen`.

Nothing compiles where TRITON_INTERPRET is set, so these tests are a process of their own.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET", "") not in ("", "0")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not INTERPRETED:
        return
    skip = pytest.mark.skip(reason="needs TRITON_INTERPRET unset: `make test-codegen`")
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(skip)
