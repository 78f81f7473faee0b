"""What the benches measure is the checkout that they lie in."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from checkout import ROOT

SCRIPT = """
import checkout, sys
{before}
checkout.load_checkout()
import multilora.version, multilora_kernels.tiles, tests.harness.paths
for name in ("multilora.version", "multilora_kernels.tiles", "tests.harness.paths"):
    print(sys.modules[name].__file__)
"""


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A folder with other packages of these names, as of another version that is installed."""
    for name in ("multilora", "multilora_kernels", "tests"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("")
    return tmp_path


def run(installed: Path, before: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", SCRIPT.format(before=before)],
        env={**os.environ, "PYTHONPATH": f"{ROOT / 'bench'}:{installed}"},
        cwd=installed,
        capture_output=True,
        text=True,
        check=False,
    )


def test_packages_come_from_the_checkout_whatever_is_installed(installed: Path) -> None:
    done = run(installed)
    files = [Path(line).resolve() for line in done.stdout.splitlines()]
    wanted = ("multilora/version.py", "kernels/tiles.py", "tests/harness/paths.py")
    assert files == [ROOT / path for path in wanted], done.stderr


def test_another_package_that_was_imported_before_is_refused(installed: Path) -> None:
    last = run(installed, before="import multilora").stderr.splitlines()[-1]
    assert last.startswith("ImportError: multilora was imported from [")
    assert last.endswith(f"and not from this checkout: {ROOT / 'multilora'}")
