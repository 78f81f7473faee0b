"""Every kernel is timed in both forms."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch

import multilora_kernels as mk
from multilora_kernels import library
from tests.harness.paths import ROOT

BENCH = ROOT / "bench"


# Ops without a row of their own here, and why.
UNTIMED = {
    "linear": "bench_gemm.py",
    "linear_packed": "bench_gemm.py",
    "add_rms_norm_": "what `rms_norm` is with a residual",
    "lora_columns_": "as lora_shrink, a column for each rank row",
    "lora_embed_": "as lora_, of one column",
    "lora_expand_": "half of lora_",
    "lora_shrink": "half of lora_",
    "lora_splits": "a number",
    "apply_token_mask_": "one pass over a mask",
}


def test_every_kernel_is_timed_in_both_forms() -> None:
    command = [sys.executable, "-m", "pytest", BENCH / "bench_kernels.py", "--benchmark-disable"]
    options = ["--work", "tiny", "--precision", "bf16", "--ranks", "5,16", "-v"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.findall(r"::test_(\w+)\[(.*)\] (PASSED|SKIPPED)", done.stdout)
    outcomes: dict[str, dict[tuple[str, ...], str]] = {"C++": {}, "torch": {}}
    for op, case, outcome in found:
        form, rest = ("C++", "torch")["torch" in case.split("-")], set(case.split("-"))
        outcomes[form][(op, *sorted(rest - {"C++", "torch"}))] = outcome
    assert outcomes["C++"].keys() == outcomes["torch"].keys()
    assert set(outcomes["torch"].values()) == {"PASSED"}
    assert set(outcomes["C++"].values()) == {"PASSED" if mk.HAS_CPP else "SKIPPED"}
    timed = {case[0] for case in outcomes["torch"]}
    assert timed == {op.rstrip("_") for op in library.KERNELS["CPU"].keys() - UNTIMED.keys()}


def test_a_kernel_is_timed_only_if_it_computes_its_definition() -> None:
    from bench_kernels import assert_same

    def wrong(x: torch.Tensor) -> torch.Tensor:
        return mk.reference.silu_mul(x) * 1.001

    def clobbers(x: torch.Tensor) -> torch.Tensor:
        y = mk.reference.silu_mul(x)
        x[0, 0] += 1
        return y

    x = torch.randn(3, 8)
    assert_same(mk.silu_mul, mk.reference.silu_mul, (x,))
    for op in (wrong, clobbers):
        with pytest.raises(AssertionError):
            assert_same(op, mk.reference.silu_mul, (x,))
