"""The workloads that tuning times, run once in the interpreter with small shapes."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from multilora_kernels import plans, tune
from multilora_kernels.testing.guard import guarded
from tests import fake_cuda


@pytest.mark.parametrize("tokens", [4, 512], ids=["decode", "prefill"])
@pytest.mark.parametrize(
    ("op", "shape"),
    [("lora_shrink", (128, 2)), ("lora_expand", (256, 2)), ("lora_expand", (128, 1))],
)
def test_a_workload_runs(
    op: str, shape: tuple[int, int], tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "COPIES", 2)
    work = tune.make_workload(op, shape, tokens, torch.device("cpu"))
    before = work.rows.clone()
    launches = tune.calls(op, shape, work, plans.load(90).choose(op, shape, tokens), num_sms=2)
    assert len(launches) == 2
    with guarded():
        found = launches[0]()
    assert work.rows.isfinite().all()
    if op == "lora_shrink":
        assert isinstance(found, torch.Tensor)
        assert found.isfinite().all()
    else:
        assert not torch.equal(work.rows, before)


def test_the_clock_of_a_gpu_runs_on_a_stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Events and graphs are not real there; the launches before the capture are."""
    calls = fake_cuda.install(monkeypatch)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: nullcontext())
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda self: calls.append("replay"))
    monkeypatch.setattr(tune, "COPIES", 2)
    time = tune.gpu_timer(torch.device("cpu"))
    for op, shape in (("lora_shrink", (128, 2)), ("lora_expand", (128, 1))):
        assert time(op, shape, 4, plans.load(90).choose(op, shape, 4)) >= 0
    assert calls.count("replay") == 10
