"""What went wrong elsewhere with requests: hostile ones, too many, ended ones, shared prompts."""

from __future__ import annotations

import math
import random
from typing import TYPE_CHECKING, Any

import pytest

from multilora.errors import RequestError
from multilora.sampling_params import SamplingParams
from multilora.scheduling import prefix_cache
from multilora.scheduling.block_pool import ROOT_KEY, block_key
from tests.harness.failpoints import calls_of
from tests.harness.tiny_engines import Job, add, drain, facts, greedy, prompt_of, run

if TYPE_CHECKING:
    from collections.abc import Iterable

    from multilora.engine.engine import Engine

    from .conftest import World

HUGE = 10**5000  # Python refuses to print it
BAD_IDS = (-1, 128, 2**31, 2**63, -HUGE, HUGE, True, 1.0, math.nan, None, "5")
TIGHT = {"num_kv_blocks": 12, "block_size": 8, "max_num_seqs": 3, "max_num_batched_tokens": 24}


def test_a_prompt_that_is_none(world: World) -> None:
    """CVE-2024-8768: an empty prompt ended the server. Others' answers must go on."""
    engine, job = world.engine("a"), world.job("a")
    request = add(engine, job)
    engine.step()
    prompts: list[Any] = [(), [], "", None, 5, b"abc", [[5]], {5: 6}, *([5, i] for i in BAD_IDS)]
    for prompt in prompts:
        with pytest.raises(RequestError) as caught:
            engine.add_request(prompt)
        assert len(str(caught.value)) < 1000
    engine.check_integrity()
    assert facts(drain(engine)[request]) == world.alone(job)


LIMITS: dict[str, tuple[Any, Any]] = {  # least and most that are taken
    "n": (1, 128),
    "top_k": (-1, 2**63 - 1),
    "max_tokens": (1, 2**63 - 1),
    "min_tokens": (0, 2**63 - 1),
    "seed": (-(2**63), 2**63 - 1),
    "temperature": (0.0, 100.0),
    "top_p": (1e-9, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (1e-9, 100.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
}
NUMBERS = (-HUGE, -(2**63) - 1, -(2**31), 2**31, 2**63, HUGE, math.nan, math.inf, -math.inf, "1")


@pytest.mark.parametrize("name", LIMITS)
def test_a_number_beyond_what_one_request_may_ask_for(world: World, name: str) -> None:
    """vLLM's `n` of a million, CVE-2024-8939, CVE-2026-21869: no bounds, or none below."""
    least, most = LIMITS[name]
    for value in NUMBERS:
        if isinstance(value, int) and least <= value <= most:
            continue
        with pytest.raises(RequestError) as caught:
            SamplingParams(**{name: value})
        assert name in str(caught.value)
        assert len(str(caught.value)) < 1000
    engine = world.engine(max_model_len=24)
    for value in (least, most):
        if name != "n":
            fields: dict[str, Any] = {"max_tokens": None, "ignore_eos": True, name: value}
            output = run(engine, [Job(prompt_of(20), SamplingParams(**fields))])[0]
            assert output.error is None
            assert len(output.outputs[0].token_ids) == (1 if fields["max_tokens"] == 1 else 4)


@pytest.mark.parametrize("name", ["stop_token_ids", "allowed_token_ids", "logit_bias"])
def test_token_ids_that_are_none(world: World, name: str) -> None:
    """CVE-2026-21869, CVE-2024-8768: an id was taken for an index, whatever it was."""
    engine = world.engine()

    def ask(ids: Iterable[Any]) -> None:
        value = dict.fromkeys(ids, 1.0) if name == "logit_bias" else tuple(ids)
        engine.add_request(prompt_of(5), SamplingParams(**{name: value}))

    bad_ids = BAD_IDS[:-1] if name == "logit_bias" else BAD_IDS  # whose ids may be digits
    for ids in (*([5, bad] for bad in bad_ids), range(-(10**6), 0)):
        with pytest.raises(RequestError) as caught:
            ask(ids)
        assert len(str(caught.value)) < 1000
    assert not engine.has_work


def test_a_storm_of_requests_that_are_given_up(world: World) -> None:
    """CVE-2026-9540 and client disconnects: what those had held was never free again."""
    engine, draw = world.engine("a", "b", **TIGHT), random.Random(0)
    kept = world.job("a", 30, 60)
    request = add(engine, kept)
    for number in range(30):
        spec = draw.choice((None, "a", "b", {"a": 0.5, "b": 0.5}))
        params = greedy(9, n=draw.choice((1, 2)))
        given_up = add(engine, Job(prompt_of(draw.choice((4, 30)), seed=number), params, spec))
        for _ in range(draw.randrange(3)):
            engine.step()
        engine.abort(given_up)
        engine.check_integrity()
    assert facts(drain(engine)[request]) == world.alone(kept)
    assert (engine.memory()["kv"], engine.stats.running, engine.stats.waiting) == (0, 0, 0)
    engine.unload_adapter("a")
    engine.unload_adapter("b")
    assert engine.memory()["adapters"] == 0


def calls_with_a_queue_of(world: World, count: int) -> int:
    """Calls of a step beside which so many wait, of which none can have a slot."""
    engine = world.engine("a", "b", max_loras=1, max_num_seqs=2)
    add(engine, world.job("a", 4, 50))
    engine.step()
    for _ in range(count):
        add(engine, world.job("b", 4, 1))
    engine.step()
    return calls_of(engine.step)


def test_a_step_beside_a_long_queue(world: World) -> None:
    """A flood of requests for an adapter without a slot: steps took the square of its length."""
    short, long = (calls_with_a_queue_of(world, count) for count in (100, 800))
    assert short > 100
    assert long <= 9 * short


def test_a_long_prompt_that_waits_for_room(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill-and-Squeeze (arXiv 2602.07878): one prompt that waits must not cost all others a step.

    Its cached start was hashed anew in every step.
    """
    engine = world.engine(num_kv_blocks=24)
    cached = prompt_of(160)
    run(engine, [Job(cached, greedy(1))])
    for length in (200, 10):  # with the ten blocks of the cached prompt they fill the pool
        add(engine, world.job(length=length, count=40, seed=1))
    for _ in range(5):
        engine.step()
    waits = Job((*cached, *prompt_of(60, seed=2)), greedy(2, logprobs=2))
    request = add(engine, waits)
    hashed: list[int] = []
    real = prefix_cache.block_key
    with monkeypatch.context() as patch:
        patch.setattr(prefix_cache, "block_key", lambda *a: hashed.append(1) or real(*a))
        for _ in range(10):
            engine.step()
    assert engine.stats.waiting == 1
    assert 10 <= len(hashed) <= 16
    assert facts(drain(engine)[request]) == world.alone(waits)


def poison(engine: Engine, used: set[int]) -> None:
    """Fills the KV of all other blocks with NaN."""
    free = [block for block in range(engine.pool.num_blocks) if block not in used]
    for cache in (engine.runner.cache.k, engine.runner.cache.v):
        cache[:, free] = math.nan


def test_blocks_that_are_given_back(world: World) -> None:
    """vLLM #38606, #37076, #39146: freed blocks were still found, or read, by others."""
    engine, draw = world.engine("a", "b", **TIGHT), random.Random(1)
    jobs: dict[str, Job] = {}
    todo = [world.job(draw.choice((None, "a", "b")), n, 12, n % 2) for n in (9, 30, 40) * 6]
    while todo or engine.has_work:
        while todo and len(engine.request_ids) < 5:
            job = todo.pop()
            jobs[add(engine, job)] = job
        if draw.random() < 0.15 and len(engine.request_ids) > 2:
            engine.abort(draw.choice(engine.request_ids))
        poison(engine, set(range(engine.pool.num_blocks)) - set(engine.pool._free))
        for output in engine.step():
            if output.finished:
                assert facts(output) == world.alone(jobs[output.request_id])
        engine.check_integrity()
    assert engine.stats.preemptions > 3
    assert run(engine, [jobs["request-0"]])[0].num_cached_tokens > 0


def test_a_prompt_whose_step_failed_is_not_in_the_cache(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM #38606, #37076: a block was in the prefix cache before its KV was written."""
    for depth in (False, True):
        engine, job = world.engine(async_scheduling=depth), world.job(length=60)
        poison(engine, set())
        with monkeypatch.context() as patch:

            def fails(*args: object) -> None:
                patch.undo()
                raise MemoryError("planted")

            patch.setattr(engine.runner.model, "forward", fails)
            first, second = add(engine, job), add(engine, job)
            engine.step()
        done = drain(engine)
        assert facts(done[first]) == facts(done[second]) == world.alone(job)


def test_prompts_that_pythons_hash_takes_for_one() -> None:
    """CVE-2025-25183: cached blocks were found by `hash`, of which anyone can find collisions."""
    alike = [(-1, -2), (0, 2**61 - 1), (7, 7 + 2**61 - 1)]
    assert all(hash(one) == hash(other) for one, other in alike)
    for one, other in alike:
        keys = [block_key(ROOT_KEY, ((0, b"base"),), (token,) * 16) for token in (one, other)]
        assert keys[0] != keys[1]
        assert {len(key) for key in keys} == {32}
