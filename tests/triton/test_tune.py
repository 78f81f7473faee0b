"""The workloads that tuning times, run once in the interpreter with small shapes."""

from __future__ import annotations

import math
from contextlib import nullcontext

import pytest
import torch

from multilora_kernels.cuda import launch_plans, tune_timer
from multilora_kernels.cuda.tune_timer import Load, Scale
from multilora_kernels.testing.guard import guarded
from tests.harness import fake_cuda

SMALL = Scale(buckets=(4,), prefill=512, copies=3, evicted=1 << 10)
LOADS = [Load(4, 4, 2), Load(4, 1, 16), Load(512, 4, 8)]


@pytest.mark.parametrize("load", LOADS, ids=["distinct", "one", "prefill"])
@pytest.mark.parametrize(
    ("op", "shape"),
    [("lora_shrink", (128, 2)), ("lora_expand", (256, 2)), ("lora_expand", (128, 1))],
)
def test_a_workload_runs(op: str, shape: tuple[int, int], load: Load) -> None:
    work = tune_timer.make_workload(op, shape, load, SMALL, torch.device("cpu"))
    assert len(work.table.num_pages) == load.adapters
    before, plan = work.rows.clone(), launch_plans.load(90).choose(op, shape, load.tokens)
    launches = tune_timer.calls(op, shape, work, plan, num_sms=2)
    assert len(launches) == 3
    with guarded():
        found = launches[0]()
    assert work.rows.isfinite().all()
    if op == "lora_shrink":
        assert isinstance(found, torch.Tensor)
        assert found.isfinite().all()
        assert len(found) == math.ceil(128 / plan["block_k"])  # not more parts than K has steps
    else:
        assert len(work.planes) == load.planes
        assert not torch.equal(work.rows, before)


def test_weights_are_bounded_by_bytes() -> None:
    scale = SMALL._replace(copies=100, most_bytes=1 << 16)
    place = torch.device("cpu")
    small = tune_timer.make_workload("lora_expand", (128, 1), Load(4, 1, 1), scale, place)
    assert len(small.weights) == 16  # of 2 pages x 8 x 128 x 2 bytes
    large = tune_timer.make_workload("lora_expand", (128, 1), Load(64, 64, 1), scale, place)
    assert len(large.weights) == 2


def test_the_clock_of_a_gpu_runs_on_a_stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Events and graphs are not real there; the launches before the capture are."""
    calls = fake_cuda.install(monkeypatch)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: nullcontext())
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda self: calls.append("replay"))
    timer = tune_timer.gpu_timer(torch.device("cpu"), SMALL)
    for op, shape in (("lora_shrink", (128, 2)), ("lora_expand", (128, 1))):
        for load in (Load(4, 4, 8), Load(4, 1, 8)):
            assert timer(op, shape, load, launch_plans.load(90).choose(op, shape, 4)) > 0
    assert calls.count("replay") == 20
