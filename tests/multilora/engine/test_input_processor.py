"""What a caller asks becomes sequences, or is refused."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from multilora.errors import (
    AdapterNotFound,
    CapacityError,
    RequestError,
)
from multilora.sampling_params import SamplingParams
from tests.harness.tiny_engines import Job, drain, greedy, make_engine, prompt_of, run

if TYPE_CHECKING:
    from multilora.engine.engine import Engine

PROMPT = prompt_of(20)


def tokens(engine: Engine, adapter: Any = None, **fields: Any) -> list[int]:
    return run(engine, [Job(PROMPT, greedy(**fields), adapter)])[0].outputs[0].token_ids


def test_no_max_tokens_means_up_to_the_length_of_the_model(root: Path) -> None:
    engine = make_engine(root / "base", max_model_len=40)
    output = run(engine, [Job(PROMPT, greedy(None))])[0].outputs[0]
    assert (len(output.token_ids), output.finish_reason) == (20, "length")


def test_the_end_of_sequence_ends_an_answer_unless_ignored(engine: Engine) -> None:
    job = {"logit_bias": {2: 100.0}, "max_tokens": 5}
    ended = run(engine, [Job(PROMPT, greedy(ignore_eos=False, **job))])[0].outputs[0]
    assert (ended.token_ids, ended.finish_reason, ended.stop_reason) == ([2], "stop", None)
    assert tokens(engine, **job) == [2] * 5
    assert len(tokens(engine, ignore_eos=False, min_tokens=3, **job)) == 4


def test_a_text_prompt_is_encoded(writer: Engine) -> None:
    request = writer.add_request("Hello", greedy(2))
    output = drain(writer)[request]
    assert writer.tokenizer is not None
    assert output.prompt == "Hello"
    assert output.prompt_token_ids == writer.tokenizer.encode("Hello")


def test_n_answers_are_those_of_consecutive_seeds(engine: Engine) -> None:
    params = SamplingParams(temperature=1.5, seed=7, n=3, max_tokens=8, ignore_eos=True)
    answers = run(engine, [Job(PROMPT, params, "a")])[0].outputs
    assert [a.index for a in answers] == [0, 1, 2]
    assert len({tuple(a.token_ids) for a in answers}) == 3
    for i, answer in enumerate(answers):
        one = SamplingParams(temperature=1.5, seed=7 + i, max_tokens=8, ignore_eos=True)
        assert run(engine, [Job(PROMPT, one, "a")])[0].outputs[0].token_ids == answer.token_ids


def test_requests_without_a_seed_differ_and_repeat_with_the_engine(root: Path) -> None:
    jobs = [Job(PROMPT, SamplingParams(max_tokens=10, ignore_eos=True))] * 3

    def drawn(seed: int) -> list[list[int]]:
        engine = make_engine(root / "base", seed=seed)
        return [output.outputs[0].token_ids for output in run(engine, jobs)]

    first = drawn(1)
    assert len({tuple(ids) for ids in first}) == 3
    assert drawn(1) == first
    assert drawn(2) != first


@pytest.mark.parametrize(
    ("prompt", "fields", "adapter", "error"),
    [
        (PROMPT, {}, "nobody", AdapterNotFound),
        (PROMPT, {}, {"a": 1.0, "nobody": 1.0}, AdapterNotFound),
        (PROMPT, {}, {"a": float("nan")}, RequestError),
        ((), {}, None, RequestError),
        ("text", {}, None, RequestError),
        ((5, 128), {}, None, RequestError),
        ((-1,), {}, None, RequestError),
        ((True,), {}, None, RequestError),
        (PROMPT, {"stop_token_ids": (128,)}, None, RequestError),
        (PROMPT, {"allowed_token_ids": (128,)}, None, RequestError),
        (PROMPT, {"logit_bias": {128: 1.0}}, None, RequestError),
        (PROMPT, {"stop": "x"}, None, RequestError),
        ((5,) * 256, {}, None, CapacityError),
    ],
)
def test_a_refused_request_costs_nothing(
    engine: Engine, prompt: Any, fields: Any, adapter: Any, error: type[Exception]
) -> None:
    alone = tokens(engine, "b", max_tokens=6)
    request = engine.add_request(PROMPT, greedy(6), adapter="b")
    engine.step()
    before = (engine.memory(), engine.stats, engine.adapters)
    with pytest.raises(error):
        engine.add_request(prompt, greedy(**fields), adapter=adapter)
    assert (engine.memory(), engine.stats, engine.adapters) == before
    engine.check_integrity()
    assert drain(engine)[request].outputs[0].token_ids == alone


def test_a_prompt_larger_than_the_pool_is_refused(root: Path) -> None:
    engine = make_engine(root / "base", num_kv_blocks=2)
    with pytest.raises(CapacityError, match="num_kv_blocks"):
        engine.add_request(prompt_of(32), greedy(n=3))
    engine.check_integrity()
    assert not engine.has_work
