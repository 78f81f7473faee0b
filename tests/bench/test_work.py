"""The work of the benches: counts that the floor rests on, cases, prompts."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from work import SHAPES, adapters_of, prompts

from tests.harness.paths import ROOT

BENCH = ROOT / "bench"


def test_the_work_of_the_figures_is_what_it_says() -> None:
    shape = SHAPES["132m"]
    norms = (2 * shape.layers + 1) * shape.hidden
    assert round((shape.body + 2 * shape.head + norms) / 1e6) == 132
    llama = SHAPES["1b"]
    norms = (2 * llama.layers + 1) * llama.hidden
    assert llama.body + llama.head + norms == 1_235_814_400  # as published


def test_prompts_do_not_depend_on_their_number() -> None:
    assert prompts(2, 8, 100) == prompts(16, 8, 100)[:2]
    assert all(3 <= token < 100 for row in prompts(4, 50, 100) for token in row)


def test_cases_choose_adapters() -> None:
    assert adapters_of("base", 2) == [None, None]
    assert len(set(adapters_of("identical", 16))) == 1
    assert sorted(adapters_of("distinct", 16)) == list(range(16))  # type: ignore[type-var]


@pytest.mark.parametrize(("setting", "threads"), [("3", 3), ("4,2", 4), ("", 2), (None, 2)])
def test_threads_are_those_that_openmp_gets(setting: str | None, threads: int) -> None:
    env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    if setting is not None:
        env["OMP_NUM_THREADS"] = setting
    code = [sys.executable, "-c", "from work import THREADS; print(THREADS)"]
    done = subprocess.run(code, cwd=BENCH, env=env, capture_output=True, text=True, check=True)
    assert int(done.stdout) == threads
