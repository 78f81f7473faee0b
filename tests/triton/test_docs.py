"""The blocks of docs/kernels.md for this process. Triton wants kernels that lie in a file."""

from __future__ import annotations

import runpy
from typing import TYPE_CHECKING

from tests.harness.code_blocks import DOCS, code_blocks

if TYPE_CHECKING:
    from pathlib import Path


def test_the_page_runs(tmp_path: Path) -> None:
    script = tmp_path / "kernels_md.py"
    script.write_text(
        code_blocks(DOCS / "kernels.md", "python triton", "python triton interpreter")
    )
    assert "scale_add_" in runpy.run_path(str(script))
