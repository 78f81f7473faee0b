"""The launch tables: what is chosen, and that tokens choose nothing that enters the arithmetic."""

from __future__ import annotations

import json

import pytest

from multilora_kernels.cuda import launch_plans

ARCHITECTURES = pytest.mark.parametrize("sm", launch_plans.ARCHITECTURES)
ARITHMETIC = {"block_k", "split_k"}  # never by tokens, whatever the op


def test_the_smallest_bucket_that_holds_the_tokens() -> None:
    buckets = {"64": 1, "*": 2, "8": 3}
    found = [launch_plans.bucket_of(tokens, buckets) for tokens in (0, 8, 9, 64, 65)]
    assert found == ["8", "8", "64", "64", "*"]


def test_a_shape_has_its_entry_or_the_common_one() -> None:
    entry = {"arithmetic": {"k": 1}, "schedule": {"4": {"m": 1}, "*": {"m": 2}}}
    own = {"arithmetic": {"k": 5}, "schedule": {"*": {"m": 3}}}
    table = launch_plans.LaunchPlans({"op": {"*": entry, "32x2": own}})
    assert table.choose("op", (32, 2), 1) == {"k": 5, "m": 3}
    assert table.choose("op", (32, 1), 1) == {"k": 1, "m": 1}
    assert table.choose("op", (32, 1), 5) == {"k": 1, "m": 2}


@ARCHITECTURES
def test_tokens_choose_nothing_that_enters_the_arithmetic(sm: int) -> None:
    for op, shapes in json.loads(launch_plans.path_of(sm).read_text()).items():
        assert launch_plans.ANY in shapes, op
        for shape, entry in shapes.items():
            assert set(entry) == {"arithmetic", "schedule"}, (op, shape)
            assert launch_plans.ANY in entry["schedule"], (op, shape)
            for bucket, values in entry["schedule"].items():
                assert not set(values) & (ARITHMETIC | set(entry["arithmetic"])), (op, bucket)
            names = {frozenset(values) for values in entry["schedule"].values()}
            assert len(names) == 1, (op, shape)


def test_an_architecture_without_a_table_takes_the_next_lower_one() -> None:
    names = [launch_plans.path_of(sm).name for sm in (80, 86, 89, 90, 100, 120)]
    assert names == [f"sm{n}.json" for n in (80, 80, 80, 90, 100, 100)]


def test_an_old_gpu_is_refused_by_name() -> None:
    with pytest.raises(launch_plans.UnsupportedDevice, match=r"7\.5, .* need 8\.0"):
        launch_plans.path_of(75)
