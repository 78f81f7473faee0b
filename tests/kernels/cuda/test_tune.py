"""Tuning with a clock of our own: which entry wins, what is written, what is never tried."""

from __future__ import annotations

import json
import math
import time
from typing import TYPE_CHECKING
from zlib import crc32

import pytest

from multilora_kernels.cuda import launch_plans, tune
from multilora_kernels.cuda.tune_timer import Load, Scale

if TYPE_CHECKING:
    from pathlib import Path

    from multilora_kernels.cuda.tune_timer import Timer

QKV = ("lora_shrink", (4096, 3))


def clock(op: str, shape: tuple[int, int], load: Load, plan: launch_plans.LaunchPlan) -> float:
    """Splits of 4 are best; few columns for few tokens, many for many; the rest costs nothing."""
    if op == "lora_expand":
        return 1.0
    wanted = 2 if load.tokens <= 64 else 8
    return 1 + abs(plan["split_k"] - 4) + abs(plan["block_pages"] - wanted)


def tune_qkv(timer: Timer) -> tune.Found:
    return tune.tune(QKV, launch_plans.load(90), timer, Scale())


def test_the_fastest_candidates_win() -> None:
    found = tune_qkv(clock)
    assert found.entry["arithmetic"] == {"block_k": 64, "split_k": 4}
    pages = {bucket: values["block_pages"] for bucket, values in found.entry["schedule"].items()}
    assert pages == {"16": 2, "64": 2, "256": 8, "*": 8}
    # The present entry: splits of 8 and 4 pages, so 7, 7, 9 and 9 seconds.
    assert found.gain == pytest.approx((7 * 7 * 9 * 9) ** 0.25)


def test_a_wider_step_over_k_may_win() -> None:
    found = tune_qkv(lambda op, shape, load, plan: 1 / plan["block_k"])
    assert found.entry["arithmetic"] == {"block_k": 128, "split_k": 8}


def test_the_arithmetic_is_one_for_all_tokens_even_if_each_would_choose_another() -> None:
    def torn(op: str, shape: tuple[int, int], load: Load, plan: launch_plans.LaunchPlan) -> float:
        return 1 + abs(plan["split_k"] - (2 if load.tokens > 256 else 16))

    entry = tune_qkv(torn).entry
    assert entry["arithmetic"]["split_k"] == 16  # three buckets against one
    assert not any("split_k" in values for values in entry["schedule"].values())


def test_one_adapter_counts_as_much_as_distinct_ones() -> None:
    """2 pages are best for one, 8 for distinct ones, which take longer; 4 are good for both."""
    one, distinct = {2: 1.0, 4: 1.1, 8: 4.0}, {2: 400.0, 4: 110.0, 8: 100.0}

    def both(op: str, shape: tuple[int, int], load: Load, plan: launch_plans.LaunchPlan) -> float:
        return (one if load.adapters == 1 else distinct)[plan["block_pages"]]

    schedule = tune_qkv(both).entry["schedule"]
    assert {schedule[bucket]["block_pages"] for bucket in ("16", "64", "256")} == {4}


def test_noise_changes_nothing() -> None:
    def noisy(op: str, shape: tuple[int, int], load: Load, plan: launch_plans.LaunchPlan) -> float:
        return 1 + crc32(f"{load} {sorted(plan.items())}".encode()) % 100 / 1e4  # 1 percent

    found = tune_qkv(noisy)
    present = launch_plans.load(90).entry(*QKV)
    assert found.entry["arithmetic"] == present["arithmetic"]
    assert found.entry["schedule"]["16"] == present["schedule"]["256"]
    assert found.entry["schedule"]["*"] == present["schedule"]["*"]


def test_what_cannot_be_launched_never_wins() -> None:
    def only_few(
        op: str, shape: tuple[int, int], load: Load, plan: launch_plans.LaunchPlan
    ) -> float:
        return 1.0 if plan["num_stages"] == 3 and plan["split_k"] == 2 else math.inf

    entry = tune_qkv(only_few).entry
    assert entry["arithmetic"]["split_k"] == 2
    assert {values["num_stages"] for values in entry["schedule"].values()} == {3}
    with pytest.raises(RuntimeError, match="no candidate of lora_shrink 4096x3"):
        tune_qkv(lambda *_: math.inf)


def test_an_expand_sums_as_many_planes_as_the_shrinks_before_it_leave() -> None:
    """down and o share the shape of their outputs, but not of their inputs."""
    table, seen = launch_plans.load(90), set()

    def see(op: str, shape: tuple[int, int], load: Load, plan: launch_plans.LaunchPlan) -> float:
        seen.add((load.tokens, load.adapters, load.planes))
        return 1.0

    tune.tune(("lora_expand", (4096, 1)), table, see, Scale())
    assert {(tokens, n) for tokens, _, n in seen} == {
        (tokens, n) for tokens in (16, 64, 256, 2048) for n in (8, 16)
    }
    changed = tune.with_entry(
        table,
        ("lora_shrink", (14336, 1)),
        {**table.entry("lora_shrink", (14336, 1)), "arithmetic": {"block_k": 64, "split_k": 4}},
    )
    assert tune.planes_of(("lora_expand", (4096, 1)), changed) == [4, 8]


def test_the_8b_shapes_come_first_and_each_expand_after_its_shrinks() -> None:
    jobs = tune.all_jobs()
    assert len(jobs) == len(set(jobs)) == 14
    assert not any(8192 in shape or 28672 in shape[:1] * (op == "lora_shrink")
                   for op, shape in jobs[:7])  # fmt: skip
    for in_, out, slices in tune.SITES:
        shrink, expand = ("lora_shrink", (in_, slices)), ("lora_expand", (out, slices))
        assert jobs.index(shrink) < jobs.index(expand)


def test_the_forecast_counts_what_is_timed() -> None:
    table, scale = launch_plans.load(90), Scale()
    for job in tune.all_jobs():
        found = tune.tune(job, table, clock, scale)
        assert 0.5 < tune.count(job, table, scale) / found.timings < 1.5
    line = tune.forecast(tune.all_jobs(), table, scale)
    assert line.startswith("14 shapes, about 14")
    assert line.endswith("minutes")


def test_a_tuned_table_is_a_table(tmp_path: Path) -> None:
    before = launch_plans.load(90)
    jobs: list[tune.Job] = [("lora_shrink", (64, 2)), ("lora_expand", (128, 2))]
    *_, last = tune.retune(before, jobs, clock, Scale())
    after = last.table
    assert after.ops["lora_shrink"]["*"] == before.ops["lora_shrink"]["*"]
    assert "64x2" not in before.ops["lora_shrink"]
    tune.write(after, tmp_path / "sm90.json")
    assert [path.name for path in tmp_path.iterdir()] == ["sm90.json"]
    read = launch_plans.LaunchPlans(json.loads((tmp_path / "sm90.json").read_text()))
    assert read.choose("lora_shrink", (64, 2), 64)["split_k"] == 4
    for op, entries in read.ops.items():
        for entry in entries.values():
            one, *others = (set(values) for values in entry["schedule"].values())
            assert all(other == one for other in others), op
            assert not one & set(entry["arithmetic"])


def test_a_shape_that_time_runs_out_for_keeps_its_entry() -> None:
    before, calls = launch_plans.load(90), 0

    def slow(op: str, shape: tuple[int, int], load: Load, plan: launch_plans.LaunchPlan) -> float:
        nonlocal calls
        calls += 1
        if calls > 200:  # in the middle of the second shape
            raise tune.OutOfTime
        return clock(op, shape, load, plan)

    jobs: list[tune.Job] = [("lora_shrink", (width, 1)) for width in (4096, 8192, 14336)]
    done = list(tune.retune(before, jobs, slow, Scale()))
    assert [tuned.job for tuned in done] == jobs[:1]
    (tuned,) = done
    assert tuned.table.choose("lora_shrink", (4096, 1), 1)["split_k"] == 4
    for width in (8192, 14336):
        shape = (width, 1)
        assert tuned.table.entry("lora_shrink", shape) == before.entry("lora_shrink", shape)


def test_a_clock_ends_with_its_time() -> None:
    args = (*QKV, Load(16, 1, 8), {"split_k": 4, "block_pages": 2})
    assert tune.until(time.monotonic() + 100, clock)(*args) == 1
    with pytest.raises(tune.OutOfTime):
        tune.until(time.monotonic(), clock)(*args)


@pytest.mark.parametrize("op", tune.SPACES)
def test_candidates_know_every_parameter(op: str) -> None:
    space, entry = tune.SPACES[op], launch_plans.load(90).entry(op, ())
    assert set(space.arithmetic) == set(entry["arithmetic"])
    for options in (space.decode, space.prefill):
        assert set(options) == set(entry["schedule"]["*"])


def test_a_search_keeps_to_one_family() -> None:
    """A candidate with 64 rows for four warps would get Hopper's own matrix instruction."""
    options = {"block_m": [16, 64], "num_warps": [2, 4]}
    start = {"block_m": 16, "num_warps": 4}
    tried = []

    def score(schedule: tune.Schedule) -> float:
        tried.append(dict(schedule))
        return -schedule["block_m"] - schedule["num_warps"] / 10

    _, best = tune.descend(options, start, score)
    assert best == start
    assert {"block_m": 64, "num_warps": 4} not in tried


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tune.main([])
    assert "no CUDA device" in capsys.readouterr().err
