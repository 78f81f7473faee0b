"""Lets a bare checkout run its tests and benches: nothing is installed, nothing is on the path.

The checkout itself stays off `sys.path`: there its folder `kernels` would hide the package
`kernels` on PyPI, which transformers looks for. `tests/conftest.py` and `bench/gpu_common.py` load
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
    """Loads these packages from the checkout, unless it is what is installed, to be edited.

    What else is installed under these names is another state of the project: it is not looked at.
    """
    for name in names:
        spec = importlib.util.find_spec(name)
        places = () if spec is None else spec.submodule_search_locations or ()
        if FOLDERS[name].resolve() not in {Path(place).resolve() for place in places}:
            _load(name, FOLDERS[name])


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
