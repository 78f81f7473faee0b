"""The benches run: every engine that is installed, and the profile of a step."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from work import Work

import multilora_kernels as mk

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="the floor is measured by a C++ program")
def test_ours_and_peft_run_the_same_work_to_the_same_tokens(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    command = [sys.executable, BENCH / "bench_cpu.py", "all", "--work", "tiny", "--root", tmp_path]
    options = ["--peers", "ours,peft,mistralrs", "--precision", "fp32", "--repeat", "1"]
    size = ["--requests", "4", "--prompt", "8", "--new", "4", "--threads", "1"]
    save = tmp_path / "saved.json"
    done = subprocess.run(
        [*command, *options, *size, "--save", save], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "mistralrs: skipped" in done.stdout
    (result,) = json.loads(save.read_text())
    assert {(t["peer"], t["case"]) for t in result["timings"]} == {
        (peer, case) for peer in ("ours", "peft") for case in ("distinct", "identical", "base")
    }
    assert {gaps["others"] for gaps in result["gaps"].values()} == {0}
    assert "tokens" not in result


@pytest.mark.skipif(not mk.HAS_CPP, reason="the C++ library is not built")
def test_a_steps_parts_are_named_and_add_up(tmp_path: Path) -> None:
    from bench_step import REST, SAMPLING, STEP, Ours, floors, profile
    from models import write_all
    from work import adapters_of, prompts

    work = Work("tiny", tmp_path)
    write_all(work)
    peer, adapters = Ours(work, "fp32", 1, {}), adapters_of("distinct", 3)
    rows = prompts(3, 8, work.shape.vocab)
    parts, context = profile(peer.llm.engine, work.shape, rows, adapters, 2)
    linears = {f"linear {site}" for site in ("qkv", "o", "gate_up", "down", "lm_head")}
    assert linears | {"lora_", "paged_attention", SAMPLING, REST, STEP} <= set(parts)
    assert linears <= set(floors(work.shape, "fp32", adapters, context))
    assert all(seconds >= 0 for seconds in parts.values())
    assert parts[STEP] >= parts["lora_"] + parts["paged_attention"]
    assert not peer.llm.engine.has_work


def test_every_kernel_is_timed_in_both_forms() -> None:
    command = [sys.executable, "-m", "pytest", BENCH / "bench_kernels.py", "--benchmark-disable"]
    options = ["--work", "tiny", "--precision", "bf16", "--ranks", "5,16", "-q"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|skipped)", done.stdout)}
    assert counts.get("skipped", 0) == (0 if mk.HAS_CPP else counts["passed"])


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


@pytest.mark.parametrize(("setting", "threads"), [("3", 3), ("4,2", 4), ("", 2), (None, 2)])
def test_threads_are_those_that_openmp_gets(setting: str | None, threads: int) -> None:
    env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    if setting is not None:
        env["OMP_NUM_THREADS"] = setting
    code = [sys.executable, "-c", "from work import THREADS; print(THREADS)"]
    done = subprocess.run(code, cwd=BENCH, env=env, capture_output=True, text=True, check=True)
    assert int(done.stdout) == threads


@pytest.mark.skipif(not mk.HAS_CPP, reason="the C++ library is not built")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "int4"])
def test_linears_are_timed_beside_torchs(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import bench_gemm
    from work import SHAPES

    monkeypatch.setattr(bench_gemm, "COLD", 1 << 16)
    for in_, out in SHAPES["tiny"].fused.values():
        copies = bench_gemm.Copies(in_, out, precision)
        assert len(copies.packed) * copies.bytes >= 1 << 16
        ours, torchs = copies.timed(3, 2)
        assert ours > 0
        assert torchs > 0
