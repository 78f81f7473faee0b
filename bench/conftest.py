"""What the benches share is imported by name, under pytest as when they are run; their options."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from work import RANKS, SHAPES


def pytest_addoption(parser: pytest.Parser) -> None:
    """The names are those of the other benches."""
    group = parser.getgroup("multilora")
    group.addoption("--work", default="132m", choices=list(SHAPES), help="the model's shape")
    group.addoption("--precision", default="fp32", choices=["fp32", "bf16", "fp16"])
    group.addoption("--ranks", default=",".join(map(str, RANKS)), help="of the adapters, in turn")
