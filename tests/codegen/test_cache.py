"""Compiled kernels that `bench/gpu.py` packs are found again at another place, by Triton itself."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"
CODE = """
import torch
from triton import knobs
from multilora_kernels.cuda import elementwise
from multilora_kernels.testing.codegen import compiling

knobs.compilation.listener = lambda **facts: print(facts["cache_hit"])
with compiling(90) as launches:
    elementwise.silu_mul(torch.empty(4, 512, dtype=torch.bfloat16))
assert len(launches) == 1
"""


def test_triton_finds_what_was_packed(
    tmp_path: Path, run_python: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [str(BENCH), *sys.path])
    import gpu_files

    def compile_with(cache: Path) -> str:
        settings = {"TRITON_CACHE_DIR": str(cache), "TRITON_STORE_BINARY_ONLY": "1"}
        return run_python(CODE, **settings).strip()

    assert compile_with(tmp_path / "a") == "False"
    assert gpu_files.pack(tmp_path / "a", tmp_path) == 0
    (tmp_path / "a").rename(tmp_path / "gone")  # the paths in its lists are wrong from now on
    assert gpu_files.unpack(tmp_path, tmp_path / "b") == []
    assert not list((tmp_path / "b").rglob("*.ptx"))
    assert compile_with(tmp_path / "b") == "True"
