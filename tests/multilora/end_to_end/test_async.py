"""Steps that are prepared while the one before them runs: the answers are the synchronous ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from multilora.sampling_params import SamplingParams
from tests.harness.adapter_folders import write_adapter
from tests.harness.model_folders import TINY, write_checkpoint
from tests.harness.paths import UMA
from tests.harness.tiny_engines import Job, add, drain, facts, greedy, make_engine, prompt_of, run

if TYPE_CHECKING:
    from multilora.engine.engine import Engine

RANKS = {"a": 8, "b": 32}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("async")
    write_checkpoint(folder / "base")
    for name, rank in RANKS.items():
        write_adapter(folder / name, TINY, rank=rank, seed=rank, scale=0.3)
    return folder


def engine_of(root: Path, *, ahead: bool, **settings: Any) -> Engine:
    adapters = {name: root / name for name in RANKS}
    return make_engine(root / "base", adapters, async_scheduling=ahead, **settings)


PARAMS = {
    "greedy": {"temperature": 0},
    "seeded": {"seed": 3},
    "truncated": {"seed": 3, "top_p": 0.7, "top_k": 20, "min_p": 0.01, "temperature": 1.5},
    "penalties": {
        "temperature": 0,
        "repetition_penalty": 1.3,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.7,
    },
    "seeded penalties": {"seed": 9, "frequency_penalty": 1.0, "repetition_penalty": 0.8},
    "min_tokens": {"seed": 1, "min_tokens": 6, "ignore_eos": False, "stop_token_ids": [5, 6, 7]},
    "stop ids": {"seed": 2, "stop_token_ids": list(range(3, 40))},
    "bias": {"seed": 4, "logit_bias": {9: 4.0, 10: -100.0}},
    "allowed": {"seed": 5, "allowed_token_ids": [4, 8, 15, 16, 23, 42]},
    "logprobs": {"temperature": 0, "logprobs": 4, "prompt_logprobs": 2},
    "several answers": {"seed": 6, "n": 3, "logprobs": 0},
    "one token": {"seed": 7, "max_tokens": 1},
    "no limit": {"seed": 8, "max_tokens": None},
}


def all_jobs() -> list[Job]:
    base = {"max_tokens": 12, "ignore_eos": True}
    adapters = (None, "a", "b", {"a": 0.5, "b": 0.5})
    return [
        Job(prompt_of(5 + 2 * i, seed=i), SamplingParams(**{**base, **fields}), adapters[i % 4])
        for i, fields in enumerate(PARAMS.values())
    ]


@pytest.mark.parametrize(
    "settings",
    [{}, {"num_kv_blocks": 14, "block_size": 8}, {"enforce_eager": False, "overlap_lora": False}],
    ids=["plenty", "few blocks", "graphs"],
)
def test_every_sampling_parameter_gives_the_same_answers(
    root: Path, settings: dict[str, Any]
) -> None:
    engines = [engine_of(root, ahead=ahead, **settings) for ahead in (False, True)]
    answers = [[facts(output) for output in run(engine, all_jobs())] for engine in engines]
    assert answers[0] == answers[1]
    assert all(engine.memory()["kv"] == 0 for engine in engines)
    if "num_kv_blocks" in settings:
        assert all(engine.stats.preemptions for engine in engines)
    else:
        # A prefix is published a step later, so that more of the prompts may be computed.
        ours, theirs = (replace(engine.stats, steps=0, prompt_tokens=0) for engine in engines)
        assert ours == theirs


def test_a_step_returns_what_came_of_the_one_before(root: Path) -> None:
    engine = engine_of(root, ahead=True)
    add(engine, Job(prompt_of(5), greedy(3)))
    assert engine.step() == []
    counts = []
    while engine.has_work:
        counts.append([len(output.outputs[0].token_ids) for output in engine.step()])
        engine.check_integrity()
    assert counts == [[1], [2], [3]]


def test_an_end_that_only_the_token_tells_costs_one_step_and_leaves_nothing(root: Path) -> None:
    reference = run(engine_of(root, ahead=False), [Job(prompt_of(9), greedy(8))])[0]
    stop = reference.outputs[0].token_ids[3]
    job = Job(prompt_of(9), greedy(8, stop_token_ids=[stop]))
    engine = engine_of(root, ahead=True)
    output = run(engine, [job])[0].outputs[0]
    assert (output.finish_reason, output.stop_reason) == ("stop", stop)
    assert output.token_ids == reference.outputs[0].token_ids[: len(output.token_ids)]
    assert engine.memory()["kv"] == 0
    assert engine.stats.generated_tokens == len(output.token_ids)


def test_stop_strings_end_an_answer_where_they_would(tmp_path: Path) -> None:
    if not UMA.is_dir():
        pytest.skip("the demo's model is not part of this checkout")
    texts = []
    for ahead in (False, True):
        engine = make_engine(
            UMA / "base",
            skip_tokenizer_init=False,
            async_scheduling=ahead,
            max_model_len=64,
        )
        job = SamplingParams(temperature=0, max_tokens=30, stop=["e"])
        engine.add_request("A short text", job)
        texts.append([facts(output) for output in drain(engine).values()])
    assert texts[0] == texts[1]


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_an_aborted_request_gives_all_back_and_its_neighbour_stays(root: Path, steps: int) -> None:
    engine = engine_of(root, ahead=True)
    alone = facts(run(engine, [Job(prompt_of(9), greedy(), "b")])[0])
    free = engine.pool.num_free
    gone = add(engine, Job(prompt_of(40, seed=1), greedy(30), "a"))
    kept = add(engine, Job(prompt_of(9), greedy(), "b"))
    for _ in range(steps):
        engine.step()
    assert engine.abort(gone)
    engine.check_integrity()
    assert facts(drain(engine)[kept]) == alone
    assert engine.pool.num_free == free
    engine.check_integrity()


def test_the_last_request_can_be_aborted_in_flight(root: Path) -> None:
    engine = engine_of(root, ahead=True)
    request = add(engine, Job(prompt_of(9), greedy(30), "a"))
    engine.step()
    engine.step()
    assert engine.abort(request)
    assert not engine.has_work
    assert engine.memory()["kv"] == 0
    assert engine.step() == []
    engine.check_integrity()


def test_a_replaced_adapter_serves_its_old_requests_to_the_end(root: Path) -> None:
    wanted = facts(run(engine_of(root, ahead=False), [Job(prompt_of(9), greedy(12), "a")])[0])
    engine = engine_of(root, ahead=True)
    request = add(engine, Job(prompt_of(9), greedy(12), "a"))
    for _ in range(4):
        engine.step()
    engine.load_adapter("a", root / "b")
    engine.unload_adapter("b")
    later = add(engine, Job(prompt_of(9), greedy(12), "a"))
    finished = drain(engine)
    assert facts(finished[request]) == wanted
    assert facts(finished[later]) != wanted
