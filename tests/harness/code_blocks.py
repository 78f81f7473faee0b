"""The Python in a page of the documentation."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from tests.harness.paths import ROOT

if TYPE_CHECKING:
    from pathlib import Path

_BLOCK = re.compile(r"^```(.*)\n((?:.*\n)*?)```$", re.MULTILINE)
DOCS = ROOT / "docs"


def code_blocks(page: Path, *infos: str) -> str:
    """All blocks that begin with one of these lines, in order, each at its own line numbers."""
    text, source = page.read_text(encoding="utf-8"), ""
    for block in _BLOCK.finditer(text):
        if block[1] in infos:
            lines = text.count("\n", 0, block.start(2)) - source.count("\n")
            source += "\n" * lines + block[2]
    return source
