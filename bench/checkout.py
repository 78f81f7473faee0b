"""Lets a script of this folder import the checkout it lies in, which need not be installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def load_checkout() -> None:
    """Makes `multilora`, `multilora_kernels` and `tests` importable from a bare checkout."""
    path = ROOT / "tests" / "harness" / "checkout_packages.py"
    spec = importlib.util.spec_from_file_location("checkout_packages", path)
    assert spec is not None
    assert spec.loader is not None
    packages = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(packages)
    packages.load_packages("multilora_kernels", "multilora", "tests")
