"""What is read from a profiler's trace, on traces that are written by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import gpu_profile
import gpu_trace
import pytest
import torch
from gpu_limits import Judge
from gpu_model import Card, Kernel, Step, decode, predict
from gpu_timing import Bench
from gpu_trace import Launch
from work import Shape

if TYPE_CHECKING:
    from collections.abc import Sequence

SHAPE = Shape(2, 64, 4, 2, 16, 96, 128)
CARD = Card("even", 1e12, 1e15, 1e15, 1e15, 10.0, 1.0, 1.0, 0.0, 0.0)
GAP = 1.0
NAMES = {  # as they are on a GPU
    "rms_norm": "_rms_norm_kernel",
    "linear": "nvjet_tst_64x8_64x16_4x1_v_bz_TNT",
    "rope_store_kv": "_rope_store_kv_kernel",
    "attention": "_split_kernel",
    "merge": "merge_kernel",
    "silu_mul": "_silu_mul_kernel",
    "lora_shrink": "_shrink_kernel",
    "lora_expand": "_expand_kernel",
    "embed": "void at::native::index_elementwise_kernel",
    "sample": "void at::native::reduce_kernel",
}


def order(step: Step) -> list[str]:
    """The labels of a step's kernels as they come: shrink beside the product that it belongs to."""
    adapted = bool(step.ranks)

    def site(name: str) -> list[str]:
        around = [f"lora_shrink {name}"], [f"lora_expand {name}"]
        return [*around[0] * adapted, f"linear {name}", *around[1] * adapted]

    layer = ["rms_norm", *site("qkv"), "rope_store_kv", "attention", "merge", *site("o")]
    layer += ["rms_norm", *site("gate_up"), "silu_mul", *site("down")]
    kernels = {k.label: k.count for k in predict(SHAPE, step).kernels}
    ends = ["embed"] * kernels["embed"], ["sample"] * kernels["sample"]
    return [*ends[0], *layer * SHAPE.layers, "rms_norm", "linear lm_head", *ends[1]]


def trace_of(steps: Sequence[Step], slow: dict[str, float] | None = None) -> dict[str, Any]:
    """A trace in which every kernel takes what the model says, or so many times of it."""
    at, events = 100.0, []
    for step in steps:
        kernels = {k.label: k for k in predict(SHAPE, step, CARD).kernels}
        for label in order(step):
            us = kernels[label].predicted_us(CARD) * (slow or {}).get(label, 1.0)
            name = NAMES[label.partition(" ")[0]]
            is_beside = label.startswith("lora_shrink")
            event = {"ph": "X", "cat": "kernel", "name": name, "ts": at, "dur": us}
            events.append(event)
            at += 0.1 if is_beside else us + GAP
        launch = {"ph": "X", "cat": "cuda_runtime", "ts": at, "dur": 1}
        events += [{**launch, "name": n} for n in ("cudaGraphLaunch", "cudaEventRecord")]
    events.append({"ph": "X", "cat": "cpu_op", "name": "aten::sum", "ts": 0, "dur": 5})
    events.append({"ph": "M", "name": "process_name"})
    return {"traceEvents": events}


@pytest.mark.parametrize("adapters", [0, 2])
def test_every_kernel_is_known_by_its_name_and_place(adapters: int) -> None:
    steps = [decode(4, 40, adapters)] * 3
    found = gpu_trace.launches(trace_of(steps))
    rows = gpu_trace.rows_of(found, SHAPE.layers)
    wanted = gpu_trace.expected([predict(SHAPE, s, CARD).kernels for s in steps], CARD)
    named = {label for label in rows if not label.startswith(gpu_trace.REST)}
    assert named == wanted.keys() - {gpu_trace.REST}
    for entry in gpu_trace.table(rows, wanted, 3, 1e12):
        if entry["kernel"] != gpu_trace.REST:
            assert entry["count"] == entry["predicted_count"], entry
    assert gpu_trace.host_launches(trace_of(steps)) == 3


def test_bytes_over_time_are_the_rate() -> None:
    step = decode(4, 40)
    kernels = [Kernel("linear qkv", 2, memory=3e6, activations=1e6), Kernel("rms_norm", 5)]
    rows = gpu_trace.rows_of(gpu_trace.launches(trace_of([step])), SHAPE.layers)
    wanted = gpu_trace.expected([kernels], CARD)
    entries = {e["kernel"]: e for e in gpu_trace.table(rows, wanted, 1, 1e12)}
    found = entries["linear qkv"]
    assert found["bytes"] == 8e6
    assert found["us"] == pytest.approx(20)  # two launches of the shortest kernel
    assert found["gigabytes_per_second"] == pytest.approx(400)
    assert found["percent_of_copy"] == pytest.approx(40)
    assert found["names"] == {NAMES["linear"]: {"count": 2, "us": 20}}
    assert "bytes" not in entries["silu_mul"]
    assert len(gpu_trace.lines(list(entries.values()))) == 1 + len(entries)


def test_gaps_are_when_nothing_runs() -> None:
    found = [Launch("a", 0, 10), Launch("b", 2, 3), Launch("c", 8, 4), Launch("d", 15, 5)]
    assert gpu_trace.busy(found) == (17, [3])
    summary = gpu_trace.summary(found, 2)
    assert summary["launches"] == 2
    assert summary["sum_of_kernels_us"] == 11
    assert summary["busy_us"] == 8.5
    assert summary["gap_us"] == 1.5
    assert gpu_trace.summary(found[:1], 1)["gap_us"] == 0


def test_without_a_gpu_the_outermost_operators_count() -> None:
    def op(name: str, ts: float, dur: float, tid: int = 1) -> dict[str, Any]:
        return {"ph": "X", "cat": "cpu_op", "name": name, "ts": ts, "dur": dur, "tid": tid}

    events = [op("aten::add", 2, 3), op("multilora::lora_", 1, 8), op("aten::mul", 9, 1)]
    events.append(op("aten::copy_", 3, 1, tid=2))
    names = [launch.name for launch in gpu_trace.launches({"traceEvents": events})]
    assert names == ["multilora::lora_", "aten::copy_", "aten::mul"]


def explained(slow: dict[str, float], adapters: int = 2) -> tuple[dict[str, Any], str]:
    """What `bench/gpu_profile.py` makes of a traced step in which these kernels are slow."""
    content: dict[str, Any] = {"results": [], "compiled": 0}
    report = SimpleNamespace(content=content, add=lambda **r: content["results"].append(r))
    report.write = lambda: None
    watch = SimpleNamespace(while_timed=[], compiled=[])
    bench: Any = Bench(None, report, None, watch, Judge(content), 1e12, CARD)  # type: ignore[arg-type]
    profile = gpu_profile.Profile.__new__(gpu_profile.Profile)
    profile._bench, profile._session = bench, SimpleNamespace(shape=SHAPE)  # type: ignore[assignment]
    steps = [decode(4, 40, adapters)] * 2
    wall = predict(SHAPE, steps[0], CARD).us
    profile._explain("a step", {"batch": 4}, trace_of(steps, slow), steps, wall, 5.0)
    return content, bench.close("1 results")


def test_a_slow_kernel_is_named_and_no_other(capsys: pytest.CaptureFixture[str]) -> None:
    content, line = explained({"lora_expand down": 3.5, "silu_mul": 2.9, "linear o": 2.0})
    assert content["slow"] == [
        {"case": "a step: lora_expand down", "times": 3.5, "of": "its prediction", "limit": 3.0}
    ]
    assert line == "1 results; slow: 1: a step: lora_expand down (3.5 x its prediction)"
    (result,) = content["results"]
    by_name = {kernel["kernel"]: kernel for kernel in result["kernels"]}
    assert by_name["lora_expand down"]["measured_to_predicted"] == 3.5
    assert by_name["silu_mul"]["measured_to_predicted"] == 2.9
    assert result["measured_to_predicted"] == 1
    assert result["launches"] == result["predicted_launches"]
    printed = capsys.readouterr().out
    assert "lora_expand down" in printed
    assert "gap_us" in printed


def test_a_step_as_predicted_has_nothing_slow() -> None:
    for adapters in (0, 2):
        content, line = explained({}, adapters)
        assert content["slow"] == []
        assert line == "1 results; slow: 0"


def test_the_profiler_sees_operators_without_a_gpu() -> None:
    device = SimpleNamespace(synchronize=lambda: None)
    bench: Any = SimpleNamespace(device=device, rehearsed=True)
    trace = gpu_profile.traced(lambda: torch.ones(64, 64) @ torch.ones(64, 64), bench)
    assert "aten::matmul" in [launch.name for launch in gpu_trace.launches(trace)]
