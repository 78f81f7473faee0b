"""How `bench/gpu_kernels.py` times and checks: on a stand-in for a GPU, with the CPU's kernels."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import gpu_kernels
import gpu_timing
import pytest
import torch
from gpu_attention import Attention, attend
from gpu_kernels import BATCHES, Case, Plan, Problem, cases, measure
from gpu_limits import Judge
from gpu_model import Card
from gpu_timing import EVICT, Bench, ColdClock, Watch, l2_bytes, sets_of

from multilora.config.lora_sites import sites_of
from multilora.config.presets import SHAPES
from multilora_kernels import Table, Tiles, reference
from tests.harness import fake_cuda
from tests.harness.fake_cuda import FakeCuda
from tests.harness.model_folders import TINY

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CASE = Case("qkv", 8, "uniform", 16)
PLAN = Plan(torch.bfloat16, (8,), 3, 1)
KERNEL_US = 1e5
CARD = Card("patient", 1e15, 1e15, 1e15, 1e15, KERNEL_US, 0.0, 0.0, 0.0, 0.0)
L2_H200 = 60 << 20


class Report:
    """What a part writes, without a file."""

    def __init__(self) -> None:
        self.content: dict[str, Any] = {"results": [], "compiled": 0}

    def add(self, **result: Any) -> None:
        self.content["results"].append(result)

    def fail(self, why: str) -> None:
        self.content.setdefault("failures", []).append(why)

    def write(self) -> None:
        pass


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    fake_cuda.install(monkeypatch)
    monkeypatch.setattr(FakeCuda, "WARM_UPS", 1)
    device, report, watch = FakeCuda(), Report(), Watch()
    judge = Judge(report.content)
    clock = ColdClock(device, watch)
    with torch.inference_mode():
        yield Bench(device, report, clock, watch, judge, 1e10, CARD)  # type: ignore[arg-type]


def problem(bench: Bench, case: Case = CASE) -> Problem:
    return Problem(case, PLAN, bench.device, TINY)


# What timing adds to y ----------------------------------------------------------------------------


def test_a_check_does_not_see_what_timing_has_added(bench: Bench) -> None:
    found = problem(bench)
    fresh, steps = found.y.clone(), found.ours()
    bench.clock.of_graph(steps * 10, 20)
    assert found.y.abs().mean() > 10 * fresh.abs().mean(), "timing must add, or this shows nothing"
    for name, way in gpu_kernels.ways(found).items():
        found.y.mul_(2).add_(100)  # as after much of it
        assert found.error_of(way[0]) <= gpu_kernels.TOLERANCE, name
        assert torch.equal(found.y, fresh)


def test_all_ways_are_timed_and_their_numbers_stand(bench: Bench) -> None:
    found = problem(bench)
    measure(found, 20, bench)
    (result,) = bench.report.content["results"]
    assert "failures" not in bench.report.content
    for name in ("ours", "bmm_gather", "loop"):
        assert len(result[name]["microseconds"]) == 3, (name, result[name])
    assert result["predicted_us"] == 2 * KERNEL_US
    assert 0 <= result["measured_to_predicted"] < 3
    assert isinstance(result["measured_to_best_comparator"], float)  # of noise here, rounded


# Cold weights -------------------------------------------------------------------------------------


def test_no_cell_finds_its_weights_in_a_cache_and_all_fit_into_memory() -> None:
    sites = sites_of(SHAPES["llama-3.1-8b"])
    cold, found = EVICT * L2_H200, list(cases(BATCHES))
    assert len(found) == 4 * len(BATCHES) * 4 * 4
    for case in found:
        size = case.weight_bytes(sites[case.site], 2)
        sets = sets_of(size, cold)
        assert 2 <= sets <= gpu_timing.MAX_SETS
        # From one use of a set to the next, the filler and the other sets were read.
        assert cold + (sets - 1) * size >= 3 * L2_H200
        # Ours, torch's, vLLM's and SGLang's two; theirs are padded to the largest rank.
        padded = size * max(case.ranks) * len(case.ranks) / sum(case.ranks)
        assert cold + sets * (size + 4 * padded) < 24e9, case


def test_the_cache_is_emptied_before_each_replay_and_a_chain_uses_a_set_once(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert bench.clock._filler.nbytes == EVICT * l2_bytes(bench.device) == EVICT << 14
    happened: list[str] = []
    monkeypatch.setattr(ColdClock, "evict", lambda self: happened.append("evict"))
    seconds = ColdClock.seconds

    def timed(self: ColdClock, work: Callable[[], Any]) -> float:
        happened.append("replay")
        return seconds(self, work)

    monkeypatch.setattr(ColdClock, "seconds", timed)
    counts = torch.zeros(3, dtype=torch.int64)
    bench.clock.of_graph([lambda i=i: counts[i].add_(1) for i in range(3)], 4)  # type: ignore[misc]
    assert happened == ["evict", "replay"] * 4
    before = counts.clone()
    bench.clock.of_graph([lambda: counts[0].add_(1)], 1)
    assert counts[0] > before[0]
    assert set(before.tolist()) == {before[0].item()}


def test_an_l2_cache_of_unknown_size_is_taken_to_be_large(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cuda.install(monkeypatch)
    device = FakeCuda()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: SimpleNamespace())
    assert l2_bytes(device) == gpu_timing.USUAL_L2


# A kernel that is slow ----------------------------------------------------------------------------


@pytest.fixture
def plant() -> Iterator[Callable[[str, Callable[..., Any]], None]]:
    """`plant(op, function)` puts a function in the place of an op's CPU kernel."""
    planted: list[Any] = []

    def put(op: str, function: Callable[..., Any]) -> None:
        library = torch.library.Library("multilora", "IMPL")
        library.impl(op, function, "CPU", allow_override=True)
        planted.append(library)

    yield put
    for library in planted:
        library._destroy()


def slow_lora(seconds: float) -> Callable[..., None]:
    def lora_(y: Any, x: Any, a_pages: Any, b_pages: Any, *rest: Any) -> None:
        time.sleep(seconds)
        reference.lora_(y, x, a_pages, b_pages, Table(*rest[:6]), Tiles(*rest[6:10]), rest[10])

    return lora_


@pytest.mark.filterwarnings("ignore:Warning only once for all operators")
def test_a_slow_kernel_is_named_and_a_good_one_is_not(
    bench: Bench, plant: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_timing, "MAX_SETS", 2)
    measure(problem(bench), 1, bench)
    limits = [slow["of"] for slow in bench.report.content["slow"]]
    assert "its prediction" not in limits
    bench.report.content["slow"].clear()
    plant("lora_", slow_lora(7 * KERNEL_US / 1e6))  # the limit is 3 times a shrink and an expand
    measure(problem(bench, Case("down", 4, "distinct", 8)), 1, bench)
    slow = bench.report.content["slow"]
    assert [s["of"] for s in slow] in (["its prediction", "loop"], ["its prediction", "bmm_gather"])
    for found, limit in zip(slow, (3.0, 1.05), strict=True):
        assert found["case"] == "down, batch 4, distinct, rank 8"
        assert found["times"] > found["limit"] == limit
    line = bench.close("2 cases")
    assert line.startswith("2 cases; slow: 2: down, batch 4, distinct, rank 8 (")
    assert "x its prediction" in line


@pytest.mark.filterwarnings("ignore:Warning only once for all operators")
def test_slow_attention_is_named(
    bench: Bench, plant: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_timing, "MAX_SETS", 2)
    case = Attention(1, 32, 32, 4, 2, 16)

    def slow(q: Any, *rest: Any) -> Any:
        time.sleep(7 * KERNEL_US / 1e6)
        return reference.paged_attention(q, *rest[:5], scale=rest[5])

    attend(case, torch.bfloat16, 1, bench)
    assert all(found["of"] != "its prediction" for found in bench.report.content["slow"])
    plant("paged_attention", slow)
    attend(case, torch.bfloat16, 1, bench)
    named = [found for found in bench.report.content["slow"] if found["of"] == "its prediction"]
    assert [found["case"] for found in named] == ["attention, 1 x 32, 32 queries each"]
    first, second = bench.report.content["results"]
    assert isinstance(first["torch flash"], float)
    assert second["measured_to_best_comparator"] > 1


def test_a_wrong_comparator_has_an_error_and_no_number(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = problem(bench)
    theirs = gpu_kernels.ways(found) | {"wrong": [lambda: found.y.add_(1)] * 2}
    monkeypatch.setattr(gpu_kernels, "ways", lambda _: theirs)
    measure(found, 1, bench)
    (result,) = bench.report.content["results"]
    assert "differs from the loop by" in result["wrong"]
    assert "microseconds" in result["loop"]
