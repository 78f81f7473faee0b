"""Lets a checkout run its own tests and benches: bare, or beside another one that is installed.

The checkout itself stays off `sys.path`: there its folder `kernels` would hide the package
`kernels` on PyPI, which transformers looks for. `tests/conftest.py` and `bench/checkout.py` load
this file by its path.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {
    "multilora_kernels": ROOT / "kernels",
    "multilora": ROOT / "multilora",
    "tests": ROOT / "tests",
}


def load_packages(*names: str) -> None:
    """Loads these packages from the checkout, whatever is installed.

    ImportError if one of them was imported from elsewhere before.
    """
    for name in names:
        folders = _folders(name)
        if name in sys.modules and folders != [FOLDERS[name]]:
            raise ImportError(
                f"{name} was imported from {folders}, and not from this checkout: {FOLDERS[name]}"
            )
        if folders != [FOLDERS[name]]:
            _load(name, FOLDERS[name])


def _folders(package: str) -> list[Path]:
    """Where a package is imported from, or would be."""
    if package in sys.modules:
        places = getattr(sys.modules[package], "__path__", None)
    else:
        spec = importlib.util.find_spec(package)
        places = None if spec is None else spec.submodule_search_locations
    return [Path(place).resolve() for place in places or ()]


def _load(package: str, folder: Path) -> None:
    init = folder / "__init__.py"
    spec = importlib.util.spec_from_file_location(
        package, init if init.is_file() else None, submodule_search_locations=[str(folder)]
    )
    if spec is None:  # a folder without __init__.py
        spec = importlib.util.spec_from_loader(package, None, is_package=True)
        assert spec is not None
        spec.submodule_search_locations = [str(folder)]
    module = sys.modules[package] = importlib.util.module_from_spec(spec)
    if spec.loader is not None:
        spec.loader.exec_module(module)
