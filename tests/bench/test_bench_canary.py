"""Nobody gets a token of another adapter; the bench that counts them sees where somebody does."""

from __future__ import annotations

from typing import TYPE_CHECKING

import bench_canary
import canary
import pytest
from bench_canary import Churn, World

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module", params=canary.PLACES)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    folder: Path = tmp_path_factory.mktemp("canary")
    return World(folder, canary.Teacher(canary.PLACES[request.param]))


def test_a_mix_says_the_marker_of_its_majority() -> None:
    assert canary.marker_of(()) == canary.BASE_MARKER
    assert canary.marker_of((5,)) == 5
    assert canary.marker_of((0b001100, 0b101010, 0b111000)) == 0b101000


@pytest.mark.seconds
def test_nobody_gets_a_token_of_another_adapter_while_all_change(world: World) -> None:
    churn = Churn(world, seed=1)
    found = churn.run(1000)
    assert found["wrong tokens"] == found["other answers"] == 0
    assert found["tokens"] >= 1000
    events = ("loads on demand", "evictions, host", "copies to pages", "cached prompt tokens")
    ways = ("registered", "loaded", "given", "unloaded")
    assert all(found[name] for name in (*events, *(f"{way} anew" for way in ways)))


@pytest.mark.seconds
def test_a_fault_is_counted_wherever_it_is_planted(world: World) -> None:
    for site in world.teacher.sites:
        tally = bench_canary.plant(world, site)
        assert tally["wrong tokens"] == tally["tokens"] > 0, site
        assert tally["other answers"] == tally["answers"]
    tally = bench_canary.plant(world, "prefix cache")
    assert 0 < tally["wrong tokens"] < tally["tokens"]
    assert not bench_canary.plant(world, "nothing")["wrong tokens"]
