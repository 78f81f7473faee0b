"""Tuning with a clock of our own: which entry wins, what is written, what is never tried."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from multilora_kernels import plans, tune

if TYPE_CHECKING:
    from pathlib import Path


def clock(op: str, shape: tuple[int, int], tokens: int, plan: plans.Plan) -> float:
    """Splits of 4 are best; few columns for few tokens, many for many; the rest costs nothing."""
    if op == "lora_expand":
        return 1.0
    wanted = 2 if tokens <= 64 else 8
    return 1 + abs(plan["split_k"] - 4) + abs(plan["block_pages"] - wanted)


def test_the_fastest_candidates_win() -> None:
    entry = tune.tune("lora_shrink", (4096, 3), clock)
    assert entry["arithmetic"] == {"block_k": 64, "split_k": 4}
    pages = {bucket: values["block_pages"] for bucket, values in entry["schedule"].items()}
    assert pages == {"16": 2, "64": 2, "256": 8, "*": 8}


def test_the_arithmetic_is_one_for_all_tokens_even_if_each_would_choose_another() -> None:
    def torn(op: str, shape: tuple[int, int], tokens: int, plan: plans.Plan) -> float:
        return abs(plan["split_k"] - (2 if tokens > 256 else 16)) * tokens**0.5

    entry = tune.tune("lora_shrink", (4096, 3), torn)
    assert entry["arithmetic"]["split_k"] == 16  # three buckets against one
    assert not any("split_k" in values for values in entry["schedule"].values())


def test_what_cannot_be_launched_never_wins() -> None:
    def only_few(op: str, shape: tuple[int, int], tokens: int, plan: plans.Plan) -> float:
        return 1.0 if plan["num_stages"] == 3 and plan["split_k"] == 8 else float("inf")

    entry = tune.tune("lora_shrink", (4096, 3), only_few)
    assert entry["arithmetic"]["split_k"] == 8
    assert {values["num_stages"] for values in entry["schedule"].values()} == {3}
    with pytest.raises(RuntimeError, match="no candidate of lora_shrink"):
        tune.tune("lora_shrink", (4096, 3), lambda *_: float("inf"))


def test_a_tuned_table_is_a_table(tmp_path: Path) -> None:
    before = plans.load(90)
    after = tune.retune(before, {"lora_shrink": [(64, 2)], "lora_expand": [(128, 2)]}, clock)
    assert after.ops["lora_shrink"]["*"] == before.ops["lora_shrink"]["*"]
    assert "64x2" not in before.ops["lora_shrink"]
    tune.write(after, tmp_path / "sm90.json")
    read = plans.Plans(json.loads((tmp_path / "sm90.json").read_text()))
    assert read.choose("lora_shrink", (64, 2), 64)["split_k"] == 4
    for op, entries in read.ops.items():
        for entry in entries.values():
            one, *others = (set(values) for values in entry["schedule"].values())
            assert all(other == one for other in others), op
            assert not one & set(entry["arithmetic"])


@pytest.mark.parametrize("op", tune.SPACES)
def test_candidates_know_every_parameter_and_keep_to_one_family(op: str) -> None:
    """A candidate with 64 rows for four warps would get Hopper's own matrix instruction."""
    space, entry = tune.SPACES[op], plans.load(90).entry(op, ())
    assert set(space.arithmetic) == set(entry["arithmetic"])
    for options in (space.decode, space.prefill):
        assert set(options) == set(entry["schedule"]["*"])
        assert all(map(tune.one_family, tune.candidates(options)))
    assert not tune.one_family({"block_m": 64, "num_warps": 4})


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tune.main([])
    assert "no CUDA device" in capsys.readouterr().err
