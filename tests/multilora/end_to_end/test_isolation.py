"""What a request gets is the same to the last bit, whatever runs beside it and however it runs."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import pytest
import torch

from multilora.outputs import RequestOutput
from multilora.sampling_params import SamplingParams
from tests.harness.adapter_folders import write_adapter
from tests.harness.model_folders import TINY, write_checkpoint
from tests.harness.tiny_engines import Job, add, drain, facts, make_engine, prompt_of, run

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from multilora.engine.engine import Engine

KINDS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "fp32": (torch.float32, {}),
    "bf16": (torch.bfloat16, {}),
    "int4": (torch.float32, {"quantization": "int4"}),
    "int8 pages": (torch.bfloat16, {"kv_cache_dtype": "int8"}),
}
RANKS = {"a": 4, "b": 8, "c": 16, "d": 64}
SPECS: tuple[Any, ...] = (None, *RANKS, {"a": 0.5, "d": -0.75}, {"b": 1.0, "c": 0.25}, "activated")
INVOCATION = 50  # a token that a third of the longer prompts have
CASES, MANY_CASES = 3, 125  # in each of the tests below, for each dtype


@dataclass(frozen=True)
class World:
    """A checkpoint, its adapters, and how each job answers alone in one shot."""

    base: Path
    adapters: dict[str, Path]
    alone: Callable[[int], Any]
    settings: dict[str, Any]

    def engine(self, **settings: Any) -> Engine:
        return make_engine(self.base, self.adapters, **{**self.settings, **settings})


@pytest.fixture(scope="module", params=KINDS)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp(request.param)
    dtype, settings = KINDS[request.param]
    write_checkpoint(root / "base", dtype=dtype)
    adapters = {
        name: write_adapter(
            root / name, TINY, rank=rank, seed=rank, scale=0.3, use_dora=name == "c"
        )
        for name, rank in RANKS.items()
    }
    write_adapter(
        root / "b", TINY, rank=8, seed=8, scale=0.3, targets=("q_proj", "embed_tokens", "lm_head")
    )
    write_adapter(
        root / "a",
        TINY,
        rank=RANKS["a"],
        seed=7,
        scale=0.3,
        modules_to_save=["norm", "lm_head"],
        trainable_token_indices=range(0, TINY.vocab_size, 3),
    )
    adapters["activated"] = write_adapter(
        root / "e", TINY, rank=24, seed=9, scale=0.3, alora_invocation_tokens=[INVOCATION]
    )

    @cache
    def alone(seed: int) -> Any:
        return facts(run(engine, [job_of(seed)])[0])

    made = World(root / "base", adapters, alone, settings)
    engine = made.engine(enable_prefix_caching=False, **ONE_SHOT)
    return made


ONE_SHOT = {"max_num_batched_tokens": 256, "max_num_seqs": 1}


@cache
def job_of(seed: int) -> Job:
    """A request drawn by its number: 20 prompts, any adapter or mix, greedy or seeded sampling."""
    draw = random.Random(seed)
    prompt = prompt_of(draw.choice((1, 15, 16, 17, 33, 70)), seed=draw.randrange(20))
    params = SamplingParams(
        temperature=draw.choice((0.0, 0.0, 1.0)),
        seed=seed,
        max_tokens=draw.randint(1, 8),
        ignore_eos=True,
        logprobs=5,
        prompt_logprobs=draw.choice((None, 5)),
    )
    return Job(prompt, params, draw.choice(SPECS))


def check_case(world: World, seed: int) -> None:
    """Random neighbours, order, chunks, rows, slots and blocks against each request alone."""
    draw = random.Random(seed)
    size = draw.choice((8, 16))
    engine = world.engine(
        max_num_seqs=draw.randint(1, 8),
        max_num_batched_tokens=draw.choice((5, 16, 33, 64, 100, 256)),
        max_loras=draw.choice((1, 2, 4)),
        lora_pages=draw.choice((10, 24)),
        num_kv_blocks=draw.choice((128, 192, 1024)) // size,
        block_size=size,
        enable_prefix_caching=draw.random() < 0.7,
    )
    late = [draw.randrange(40) for _ in range(draw.randint(1, 4))]
    numbers = {add(engine, job_of(n)): n for n in (draw.randrange(40) for _ in range(3))}
    finished: dict[str, RequestOutput] = {}
    while engine.has_work or late:
        if late and (not engine.has_work or draw.random() < 0.3):
            number = late.pop()
            numbers[add(engine, job_of(number))] = number
        finished |= {output.request_id: output for output in engine.step() if output.finished}
        engine.check_integrity()
    for request, number in numbers.items():
        assert facts(finished[request]) == world.alone(number), f"job {number} of case {seed}"


@pytest.mark.parametrize("case", range(3))
def test_neighbours_order_chunks_rows_and_slots_change_no_bit(world: World, case: int) -> None:
    for seed in range(case * CASES, (case + 1) * CASES):
        check_case(world, seed)


@pytest.mark.slow
@pytest.mark.parametrize("case", range(2))
def test_neighbours_change_no_bit_in_many_cases(world: World, case: int) -> None:
    for seed in range(1000 + case * MANY_CASES, 1000 + (case + 1) * MANY_CASES):
        check_case(world, seed)


def spoken(length: int, spec: Any, count: int = 20, **fields: Any) -> Job:
    params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, logprobs=5, **fields)
    return Job(prompt_of(length, seed=length), params, spec)


@pytest.mark.parametrize("scored", [None, 5])
def test_preemption_changes_no_bit(world: World, scored: int | None) -> None:
    jobs = [spoken(30 + i, spec, 12, prompt_logprobs=scored) for i, spec in enumerate(SPECS[2:6])]
    whole = world.engine(**ONE_SHOT)
    alone = [facts(run(whole, [job])[0]) for job in jobs]
    for caching in (False, True):
        tight = world.engine(num_kv_blocks=7, enable_prefix_caching=caching)
        together = [facts(output) for output in run(tight, jobs)]
        assert tight.stats.preemptions > 0
        assert together == alone


def test_a_hit_in_the_prefix_cache_changes_no_bit(world: World) -> None:
    for spec in ("a", None, SPECS[5]):
        engine = world.engine()
        job = spoken(60, spec)
        cold, warm = run(engine, [job])[0], run(engine, [job])[0]
        assert (cold.num_cached_tokens, warm.num_cached_tokens) == (0, 48)
        assert facts(warm) == facts(cold)


@pytest.mark.parametrize("slots", [1, 2])
def test_eviction_and_return_of_an_adapter_change_no_bit(world: World, slots: int) -> None:
    engine = world.engine(max_loras=slots, lora_pages=10, enable_prefix_caching=False)
    jobs = [spoken(20, spec, 6) for spec in SPECS]
    first = [facts(run(engine, [job])[0]) for job in jobs]
    again = [facts(run(engine, [job])[0]) for job in reversed(jobs)]
    assert again[::-1] == first
    assert [facts(output) for output in run(engine, jobs)] == first


def test_unloading_and_loading_again_changes_no_bit(world: World) -> None:
    engine = world.engine()
    job = spoken(40, "d")
    first = facts(run(engine, [job])[0])
    engine.unload_adapter("d")
    engine.load_adapter("d", world.adapters["d"])
    assert facts(run(engine, [job])[0]) == first


def check_long_prompt(world: World, length: int, chunk: int) -> None:
    job = spoken(length, "c", 4, prompt_logprobs=1)
    common = {"max_model_len": None, "num_kv_blocks": length // 16 + 2, "max_num_seqs": 2}
    results = []
    for tokens in (length, chunk):
        engine = world.engine(max_num_batched_tokens=tokens, **common)
        ids = add(engine, job)
        results.append(facts(drain(engine)[ids]))
        assert engine.stats.steps == -(-length // tokens) + 3
    assert results[0] == results[1]


def test_1024_tokens_in_chunks_equal_one_shot(world: World) -> None:
    check_long_prompt(world, 1024, 256)


@pytest.mark.slow
def test_8192_tokens_in_chunks_equal_one_shot(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "base", max_position_embeddings=8448)
    adapters = {"c": write_adapter(tmp_path / "c", TINY, rank=16)}
    check_long_prompt(World(tmp_path / "base", adapters, lambda seed: seed, {}), 8192, 256)
