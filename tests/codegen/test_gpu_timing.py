"""What `bench/gpu_timing.py` knows of the compiler."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from multilora_kernels.cuda import elementwise
from multilora_kernels.testing.codegen import compiling

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))

from gpu_timing import Watch


def norm(hidden: int, tokens: int = 4) -> None:
    x = torch.zeros(tokens, hidden, dtype=torch.bfloat16)
    elementwise.rms_norm(x, x[0], 1e-5)


def test_it_names_what_is_compiled_while_the_clock_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton import knobs

    others: list[str] = []
    monkeypatch.setattr(
        knobs.runtime, "jit_post_compile_hook", lambda **found: others.append(found["fn"].name)
    )
    watch = Watch()
    watch.install()
    with compiling():
        norm(64)
        with watch.timed("the same"):
            norm(64, tokens=7)
        with watch.timed("another"):
            norm(128)
    assert watch.compiled == others == ["_rms_norm_kernel"] * 2
    assert watch.while_timed == [{"timed": "another", "kernel": "_rms_norm_kernel"}]
