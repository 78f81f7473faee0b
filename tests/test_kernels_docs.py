"""What docs/kernels.md shows, run from top to bottom; Triton's blocks are in other processes."""

from __future__ import annotations

import re

import pytest

import multilora_kernels as mk
from tests.harness.code_blocks import DOCS, code_blocks

PAGE = DOCS / "kernels.md"
PYTHON, TRITON = "python", ("python triton", "python triton interpreter", "python triton codegen")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what torch's compiler imports
def test_the_page_runs() -> None:
    source = code_blocks(PAGE, PYTHON)
    assert source.count("import multilora_kernels as mk") == 1
    exec(compile(source, str(PAGE), "exec"), {})


def test_every_block_of_python_is_run_somewhere() -> None:
    """By this file, or by test_docs.py of tests/triton and tests/codegen."""
    found = set(re.findall(r"^```(\w.*)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE))
    assert found == {PYTHON, *TRITON}


def test_every_public_name_is_in_the_page() -> None:
    words = set(re.findall(r"\w+", PAGE.read_text(encoding="utf-8")))
    assert set(mk.__all__) | set(mk.ops.__all__) <= words
