"""The work of the benches: counts that the floor rests on, cases, prompts."""

from __future__ import annotations

from work import SHAPES, adapters_of, prompts


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
