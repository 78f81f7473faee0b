"""Benches measure the checkout that they lie in."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.harness.paths import ROOT


def test_an_installed_package_of_our_name_is_not_looked_at(tmp_path: Path) -> None:
    for name in ("multilora", "multilora_kernels"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ImportError('the installed one')")
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'bench')!r})\n"
        "from checkout import load_checkout; load_checkout()\n"
        "import multilora, multilora_kernels; from multilora.config import engine\n"
        "print(multilora.__file__, multilora_kernels.__file__, engine.__file__, sep='\\n')"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    wanted = ["multilora/__init__.py", "kernels/__init__.py", "multilora/config/engine.py"]
    assert [Path(name).resolve() for name in done.stdout.split()] == [ROOT / w for w in wanted]
