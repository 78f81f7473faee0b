"""Captured decode steps: which sizes there are, which one a step takes, and the bits that come out.

On a CPU a graph is a recording of operators (`device/cpu_graph.py`): like a CUDA graph it reads
nothing but fixed buffers, so a count or a table that was baked in at capture shows here. A CPU has
graphs of its own for each size, made on demand; `like_a_gpu` takes a GPU's, which are made before.
"""

from __future__ import annotations

import itertools
import logging
import re
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import multilora_kernels as mk
from multilora.device.cpu import Device
from multilora.model.rope import Rope
from multilora.runtime.graph_runner import (
    MAX_ON_DEMAND_TOKENS,
    GraphRunner,
    batch_shapes,
    tile_sizes,
    token_sizes,
)
from multilora.sampling_params import SamplingParams
from tests.harness.adapter_folders import write_adapter
from tests.harness.model_folders import TINY, write_checkpoint
from tests.harness.tiny_engines import Job, facts, greedy, make_engine, prompt_of, run

if TYPE_CHECKING:
    from pathlib import Path

    from multilora.engine.engine import Engine

needs_cpp = pytest.mark.skipif(not mk.HAS_CPP, reason="the C++ library is not built")

RANKS = {"a": 8, "b": 16, "c": 64}
WIDE = {"max_num_seqs": 40, "num_kv_blocks": 512, "max_num_batched_tokens": 256, "max_loras": 24}


@given(most=st.integers(1, 1000))
def test_token_sizes_hold_every_step_and_waste_little(most: int) -> None:
    sizes = token_sizes(most)
    assert sizes == sorted(set(sizes))
    assert all(size % 16 == 0 for size in sizes)
    assert most <= sizes[-1] < most + max(16, most / 2)
    for small, large in itertools.pairwise(sizes):
        assert large - small <= max(16, small / 2)


@given(tokens=st.integers(1, 40).map(lambda n: 16 * n), loras=st.integers(1, 64))
def test_the_largest_tile_size_holds_every_step(tokens: int, loras: int) -> None:
    sizes = tile_sizes(tokens, loras)
    assert 1 <= len(sizes) <= 2
    distinct = min(tokens, loras)
    slots = [min(i, distinct - 1) for i in range(tokens)]
    assert int(mk.make_tiles(slots, mk.DECODE_TILE).num_tiles) <= sizes[-1]
    assert int(mk.make_tiles([0] * tokens, mk.DECODE_TILE).num_tiles) <= sizes[0]


def test_every_size_comes_with_and_without_lora() -> None:
    found = [(shape.tokens, shape.tiles) for shape in batch_shapes(20, 4, 100)]
    assert found == [(32, 0), (32, 3), (32, 6), (16, 0), (16, 2), (16, 5)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("graphs")
    write_checkpoint(folder / "base")
    for name, rank in RANKS.items():
        write_adapter(folder / name, TINY, rank=rank, seed=rank, scale=0.3)
    write_adapter(folder / "q", TINY, rank=8, seed=1, scale=0.3, targets=("q_proj",))
    write_adapter(folder / "dora", TINY, rank=8, seed=3, scale=0.3, use_dora=True)
    write_adapter(folder / "head", TINY, rank=8, seed=2, scale=0.3, targets=("o_proj", "lm_head"))
    for i in range(20):
        write_adapter(folder / f"n{i}", TINY, rank=8, seed=i, targets=("v_proj", "up_proj"))
    return folder


def engine_of(root: Path, **settings: Any) -> Engine:
    names = (*RANKS, "q", "dora", "head", *(f"n{i}" for i in range(20)))
    return make_engine(root / "base", {n: root / n for n in names}, **WIDE | settings)


class Seen:
    """Counts which graphs an engine replays."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sizes: list[tuple[int, int]] = []
        assert engine.runner.graphs is not None
        run = GraphRunner.run

        def counted(graphs: GraphRunner, shape: Any, *rest: Any) -> Any:
            if graphs._key(shape) in graphs._graphs:
                self.sizes.append((shape.tokens, shape.tiles))
            return run(graphs, shape, *rest)

        monkeypatch.setattr(GraphRunner, "run", counted)


def jobs(names: list[Any]) -> list[Job]:
    """A request for each adapter, of different lengths: segments change at every step."""
    return [
        Job(
            prompt_of(5 + 3 * i, seed=i),
            SamplingParams(
                temperature=i % 2, seed=i, max_tokens=3 + i % 7, ignore_eos=True, logprobs=3
            ),
            name,
        )
        for i, name in enumerate(names)
    ]


MIXES = {
    "base": [None] * 5,
    "one": ["a"] * 6,
    "mixed ranks": ["a", "b", "c", None, {"a": 0.5, "c": -1.0}, "c", "q"],
    "a site of one alone": ["q", None],
    "dora beside others": ["dora", "a", None, {"dora": 0.5, "b": 1.0}, "dora"],
    "more than sixteen rows": [*RANKS, None, "q"] * 5,
    "more tiles than the small graph": [f"n{i}" for i in range(20)],
}


@pytest.fixture(params=[pytest.param("on demand", marks=needs_cpp), "like a GPU"])
def style(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How graphs are captured."""
    if request.param == "like a GPU":
        monkeypatch.setattr(Device, "captures_on_demand", False)
    return str(request.param)


@pytest.fixture
def like_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Device, "captures_on_demand", False)


def eager(root: Path, work: list[Job]) -> list[Any]:
    return [facts(output) for output in run(engine_of(root, enforce_eager=True), work)]


@pytest.mark.seconds
@pytest.mark.parametrize("case", MIXES)
def test_replays_give_the_bits_of_eager_steps(
    root: Path, case: str, style: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, wanted = engine_of(root), eager(root, jobs(MIXES[case]))
    seen = Seen(engine, monkeypatch)
    for _ in range(3):  # at last all sizes are captured, and prompts come from the prefix cache
        assert [facts(output) for output in run(engine, jobs(MIXES[case]))] == wanted
    assert seen.sizes
    if case == "base":
        assert {tiles for _, tiles in seen.sizes} == {0}
    if style == "on demand":  # no row is padding
        assert {tokens for tokens, _ in seen.sizes} <= set(range(1, len(MIXES[case]) + 1))


@pytest.mark.seconds
def test_many_adapters_take_the_next_graph_and_none_is_cut_off(
    root: Path, like_a_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(root)
    seen = Seen(engine, monkeypatch)
    run(engine, jobs(MIXES["more tiles than the small graph"]))
    small, large = tile_sizes(32, WIDE["max_loras"])
    assert {tiles for tokens, tiles in seen.sizes if tokens == 32} == {large}
    seen.sizes.clear()
    run(engine, [Job(prompt_of(4, seed=i), greedy(4), "a") for i in range(20)])
    assert {tiles for tokens, tiles in seen.sizes if tokens == 32} == {small}


def test_an_adapted_head_and_prompts_run_uncaptured(
    root: Path, style: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = [Job(prompt_of(20), greedy(4), "head"), Job(prompt_of(9), greedy(4), "a")]
    engine = engine_of(root)
    seen = Seen(engine, monkeypatch)
    assert [facts(output) for output in run(engine, work)] == eager(root, work)
    assert not seen.sizes


def test_graphs_survive_an_adapter_that_comes_and_goes(root: Path, style: str) -> None:
    answers = []
    for is_eager in (True, False):
        engine = engine_of(root, enforce_eager=is_eager)
        first = run(engine, jobs(["a", "b"]))
        engine.unload_adapter("a")
        engine.load_adapter("a", root / "c")
        answers.append([facts(output) for output in (*first, *run(engine, jobs(["a", "b"])))])
    assert answers[0] == answers[1]


def test_the_first_dora_comes_when_steps_are_captured(root: Path) -> None:
    """Until then nothing is kept for its scales, and the graphs know of none."""
    names, work = ("a", "b"), jobs(["a", "b", None])
    wanted = eager(root, [*work, *jobs(["dora"])])
    engine = make_engine(root / "base", {name: root / name for name in names}, **WIDE)
    for _ in range(3):
        assert [facts(output) for output in run(engine, work)] == wanted[:3]
    engine.load_adapter("dora", root / "dora")
    for _ in range(3):
        assert [facts(output) for output in run(engine, [*work, *jobs(["dora"])])] == wanted


@pytest.mark.seconds
def test_all_graphs_write_their_logits_to_one_place(root: Path, like_a_gpu: None) -> None:
    engine = engine_of(root)
    assert engine.runner.graphs is not None
    outputs = [graph.output for graph in engine.runner.graphs._graphs.values()]
    sizes = {tuple(output.shape) for output in outputs}
    assert sizes == {(tokens, TINY.vocab_size) for tokens in (16, 32, 48)}
    assert len({output.data_ptr() for output in outputs}) == 1
    assert {o.untyped_storage().nbytes() for o in outputs} == {48 * TINY.vocab_size * 4}


def test_the_capture_says_what_it_took(
    root: Path, like_a_gpu: None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "multilora"):
        make_engine(root / "base")
    (said,) = [m for m in caplog.messages if m.startswith("captured")]
    assert re.fullmatch(
        r"captured 3 decode graphs of up to 16 tokens in \d+\.\d s and 0\.00 GB, "
        r"of 0\.04 expected",  # 32 MiB of workspace, 1.5 of the driver, 1.1 of a step
        said,
    )


@pytest.mark.seconds
def test_uncaptured_steps_have_room_for_their_own_ranks_and_captured_ones_for_all(
    root: Path, like_a_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_adapter(root / "wide", TINY, rank=136, seed=3, scale=0.1)
    seen: list[tuple[int, int]] = []
    lora = mk.lora_

    def spy(y: Any, x: Any, a: Any, b: Any, table: mk.Table, *rest: Any) -> None:
        assert table.page_ids.shape == table.page_weights.shape
        seen.append((len(x), table.page_ids.shape[1]))
        lora(y, x, a, b, table, *rest)

    monkeypatch.setattr(mk, "lora_", spy)
    engine = engine_of(root, max_lora_rank=512)
    engine.load_adapter("wide", root / "wide")
    assert {columns for _, columns in seen} == {64}  # captures
    answers = []
    for narrow in (True, False):
        if not narrow:
            monkeypatch.setattr(engine.store, "most_pages", lambda _: 64)
        for names, columns in ((["a", "c"], 16), (["a", "wide"], 32), ([{"wide": 1, "c": 1}], 32)):
            seen.clear()
            done = run(engine, [Job(prompt_of(9), greedy(3), name) for name in names])
            answers.append([facts(output) for output in done])
            assert {found for _, found in seen} == {columns if narrow else 64}
    assert answers[:3] == answers[3:]


@needs_cpp
def test_a_size_is_captured_when_it_comes_again(root: Path) -> None:
    engine = engine_of(root)
    graphs = engine.runner.graphs
    assert graphs is not None
    run(engine, [Job(prompt_of(5), greedy(2), "a")])  # one token of the prompt's step, one more
    assert len(graphs) == 0
    run(engine, [Job(prompt_of(5), greedy(3), "b")])
    assert len(graphs) == 1
    run(engine, [Job(prompt_of(5), greedy(9), "c"), Job(prompt_of(9), greedy(9), None)])
    assert len(graphs) == 2


@needs_cpp
def test_a_site_that_a_later_adapter_needs_first_is_in_the_graph_from_then_on(root: Path) -> None:
    work = [Job(prompt_of(5), greedy(8), name) for name in ("q", "a", "q")]
    engine = engine_of(root)  # no page of any site is there before the first request
    found = [facts(output) for job in work for output in run(engine, [job])]
    assert found == [fact for job in work for fact in eager(root, [job])]


@pytest.mark.seconds
@needs_cpp
def test_one_graph_serves_all_positions(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Rope, "STEP", 16)
    work = [Job(prompt_of(6, seed=i), greedy(40), "a") for i in range(2)]
    engine = engine_of(root)
    seen = Seen(engine, monkeypatch)
    assert [facts(output) for output in run(engine, work)] == eager(root, work)
    assert len(engine.runner.graphs or ()) == 1
    assert len(seen.sizes) > 30


@pytest.mark.seconds
@needs_cpp
def test_more_rows_than_graphs_are_made_for_run_uncaptured(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = MAX_ON_DEMAND_TOKENS + 3
    work = [Job(prompt_of(3, seed=i), greedy(3 + i % 4), "a") for i in range(count)]
    settings = {"max_num_seqs": count, "max_num_batched_tokens": 4 * count}
    engine = engine_of(root, **settings)
    seen = Seen(engine, monkeypatch)
    assert [facts(output) for output in run(engine, work)] == eager(root, work)
    assert all(tokens <= MAX_ON_DEMAND_TOKENS for tokens, *_ in seen.sizes)
    assert engine.runner.graphs is not None
    came = {key.shape.tokens for key in engine.runner.graphs._came}
    assert came
    assert max(came) <= MAX_ON_DEMAND_TOKENS  # and the first steps had all rows


@pytest.mark.seconds
def test_shrinking_beside_the_base_gives_the_same_answers(root: Path) -> None:
    work = jobs(MIXES["mixed ranks"])
    plain = run(engine_of(root), work)
    beside = run(engine_of(root, overlap_lora=True), work)
    assert [o.outputs[0].token_ids for o in plain] == [o.outputs[0].token_ids for o in beside]
