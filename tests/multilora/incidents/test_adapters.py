"""What went wrong elsewhere with adapters: others' weights, others' cached KV, waste, growth."""

from __future__ import annotations

import random
import shutil
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from multilora.errors import AdapterError, AdapterNotFound
from multilora.outputs import FinishReason
from multilora.runtime.graph_runner import batch_shapes, token_sizes
from tests.harness.adapter_folders import change_tensors, write_adapter
from tests.harness.failpoints import calls_of
from tests.harness.model_folders import TINY
from tests.harness.tiny_engines import Job, add, drain, facts, greedy, prompt_of, run

if TYPE_CHECKING:
    from pathlib import Path

    from .conftest import World

EVERYTHING = ("a", "b", "c", "narrow")


def test_a_narrow_adapter_takes_the_place_of_an_evicted_dense_one(world: World) -> None:
    """SGLang #7426 and #8103: what the new one does not target kept the old one's weights."""
    engine = world.engine("b", "c", "narrow", max_loras=1, lora_pages=3)
    for name in ("b", "narrow", "c", "narrow", "b"):
        world.check(engine, [world.job(name)])
        engine.check_integrity()


def test_a_slot_is_given_on_while_others_decode(world: World) -> None:
    """vLLM #47724: the slot of an adapter was remembered after another had it."""
    engine = world.engine(*EVERYTHING, max_loras=2, max_num_seqs=3)
    mix = {"a": 0.5, "b": -1.0}
    specs = ["a", "b", "c", "narrow", mix, "b", "c", "a", mix, "narrow", "a", "c", "b", "narrow"]
    jobs = [world.job(spec, 20, 2 + 3 * (i % 4), i) for i, spec in enumerate(specs)]
    ids = {add(engine, job): job for job in jobs}
    slots_of, specs_of = defaultdict(set), defaultdict(set)
    while engine.has_work:
        for output in engine.step():
            if output.finished:
                assert facts(output) == world.alone(ids[output.request_id])
        for seq in engine.scheduler.running:
            slot = engine.scheduler._holdings.adapter_slot(seq)
            slots_of[seq.mix].add(slot)
            specs_of[slot].add(seq.mix)
    assert max(map(len, slots_of.values())) == 2, "no mix ever changed its slot"
    assert min(map(len, specs_of.values())) > 2, "a slot was never given on"


def write_canary(folder: Path, number: int) -> tuple[Path, set[int]]:
    """An adapter that says nothing but its own two words, and these."""
    words = (4 + 2 * number, 5 + 2 * number)

    def speak(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if "lora_B" in name:
                tensor.zero_()
                tensor[words[0]], tensor[words[1]] = 1e4, -1e4

    write_adapter(folder, TINY, rank=1 + number, seed=number, targets=("lm_head",))
    change_tensors(folder, speak)
    return folder, set(words)


def test_no_adapter_says_the_words_of_another(world: World, tmp_path: Path) -> None:
    """vLLM #47724, SGLang #8263: weights of another adapter, while they come and go."""
    canaries = [write_canary(tmp_path / str(number), number) for number in range(24)]
    engine, draw = world.engine(max_loras=2, num_kv_blocks=24), random.Random(0)
    may_say: dict[str, set[int]] = {}
    names: dict[str, set[int]] = {}
    for _ in range(60):
        name = draw.choice("xyz")
        folder, names[name] = draw.choice(canaries)
        engine.load_adapter(name, folder)
        job = Job(prompt_of(draw.choice((5, 30))), greedy(draw.randint(1, 9)), name)
        may_say[add(engine, job)] = names[name]
        if draw.random() < 0.3:
            engine.unload_adapter(name)
        for output in engine.step():
            assert set(output.outputs[0].token_ids) <= may_say[output.request_id]
    for request, output in drain(engine).items():
        assert set(output.outputs[0].token_ids) <= may_say[request]


def test_as_many_adapters_as_slots_and_the_base(world: World) -> None:
    """SGLang #23141 and #25078: the base counted as one adapter too many, and the engine died."""
    engine = world.engine("a", "b", max_loras=2, max_num_batched_tokens=24)
    specs = (None, "a", "b", None, "a")
    world.check(engine, [world.job(spec, 50, 5, i) for i, spec in enumerate(specs)])


def test_a_name_that_is_replaced_mid_traffic(world: World, tmp_path: Path) -> None:
    """vLLM #30931 and #42125: cached KV was found by the name, whatever its weights were."""
    engine, job = world.engine("a"), world.job("a", count=12)
    run(engine, [job])
    old = add(engine, job)
    engine.step()
    engine.load_adapter("a", world.root / "b")
    new = add(engine, job)
    done = drain(engine)
    assert facts(done[old]) == world.alone(job)
    assert facts(done[new]) == world.alone(Job(job.prompt, job.params, "b"))
    assert (done[old].num_cached_tokens, done[new].num_cached_tokens) == (32, 0)
    engine.load_adapter("a", world.root / "a")
    assert facts(run(engine, [job])[0]) == world.alone(job)


def test_a_name_unloaded_while_many_answers_come(world: World) -> None:
    """SGLang #36894: after n answers for one request its adapter was never let go."""
    engine = world.engine("a", max_num_seqs=16)
    job = Job(prompt_of(20), greedy(5, temperature=1.0, n=16, seed=3), "a")
    wanted = facts(run(world.engine("a"), [job])[0])
    request = add(engine, job)
    engine.step()
    engine.unload_adapter("a")
    with pytest.raises(AdapterNotFound):
        add(engine, job)
    assert facts(drain(engine)[request]) == wanted
    memory = engine.memory()
    assert (memory["adapters"], memory["kv"]) == (0, 0)


def test_files_that_go_while_their_adapter_serves(world: World, tmp_path: Path) -> None:
    """Weights mapped from a file change or vanish with it: what is loaded must be a copy."""
    folder = tmp_path / "mine"
    shutil.copytree(world.root / "a", folder)
    engine, job = world.engine(max_loras=1), world.job("a", count=10)
    engine.load_adapter("a", folder)
    request = add(engine, job)
    engine.step()
    weights = folder / "adapter_model.safetensors"
    with weights.open("r+b") as file:  # in place: the same inode
        file.write(b"\xff" * weights.stat().st_size)
    engine.step()
    shutil.rmtree(folder)
    assert facts(drain(engine)[request]) == world.alone(job)
    with pytest.raises(AdapterError):
        engine.load_adapter("a", folder)
    world.check(engine, [job])


def test_ranks_beyond_what_kernels_elsewhere_take(world: World, tmp_path: Path) -> None:
    """vLLM #2847 and #3934, TensorRT-LLM #1903: ranks above 64, 128 or 256 were refused or wrong.

    All rank rows but the last eight are zero, so that the answer is that of rank 8, to the bit.
    """
    write_adapter(tmp_path / "small", TINY, rank=8, alpha=8, seed=5, scale=0.3)
    wide = {"max_lora_rank": 1024, "lora_pages": 128}
    small = world.engine(**wide)
    small.load_adapter("x", tmp_path / "small")
    wanted = facts(run(small, [world.job("x")])[0])
    assert wanted != world.alone(world.job())
    for rank in (72, 136, 264, 520, 1024):

        def widen(tensors: dict[str, torch.Tensor], rank: int = rank) -> None:
            for name, tensor in tensors.items():
                before = rank - 8
                sides = (0, 0, before, 0) if "lora_A" in name else (before, 0)
                tensors[name] = torch.nn.functional.pad(tensor, sides)

        folder = tmp_path / str(rank)
        write_adapter(folder, TINY, rank=8, alpha=rank, seed=5, scale=0.3)
        change_tensors(folder, widen)
        config = folder / "adapter_config.json"
        config.write_text(config.read_text().replace('"r": 8', f'"r": {rank}'))
        engine = world.engine(**wide)
        engine.load_adapter("x", folder)
        assert facts(run(engine, [world.job("x")])[0]) == wanted, rank


def test_memory_is_that_of_the_ranks_and_not_of_the_limit(world: World, tmp_path: Path) -> None:
    """vLLM #22782, SGLang #31305: every adapter took the memory of `max_lora_rank`."""
    for rank in (5, 8, 64):
        write_adapter(tmp_path / str(rank), TINY, rank=rank)
    found: dict[tuple[int, int], int] = {}
    for limit in (64, 1024):
        engine = world.engine(max_lora_rank=limit)
        for rank in (5, 8, 64):
            before = engine.memory()["adapters"]
            engine.load_adapter(str(rank), tmp_path / str(rank))
            run(engine, [world.job(str(rank), 4, 1)])
            found[limit, rank] = engine.memory()["adapters"] - before
    for limit in (64, 1024):
        small = found[limit, 8]
        assert small > 0
        assert [found[limit, rank] for rank in (5, 8, 64)] == [small, small, 8 * small]
    assert found[64, 64] == found[1024, 64]


def test_the_fortieth_adapter_is_loaded_like_the_fourth(world: World, tmp_path: Path) -> None:
    """PEFT #981: each adapter took longer to add than the one before. Counted in calls."""
    engine, counts = world.engine(), []
    for number in range(40):
        folder = write_adapter(tmp_path / str(number), TINY, rank=4, seed=number)
        counts.append(calls_of(lambda n=number, f=folder: engine.load_adapter(f"n{n}", f)))
    assert counts[3] > 100
    assert counts[39] <= 1.01 * counts[3]


class _Ops(TorchDispatchMode):
    """The names of all operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.name().partition("::")[2])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("spec", [None, "a"])
def test_steps_of_the_base_do_no_work_for_lora(world: World, spec: str | None) -> None:
    """vLLM #25914, SGLang #18082, TensorRT-LLM #17412: the base paid for adapters beside it."""
    engine = world.engine(*EVERYTHING, enforce_eager=True)
    run(engine, [world.job(name) for name in EVERYTHING])  # they are on the device from here on
    with _Ops() as ops:
        run(engine, [world.job(spec)])
    assert any("rms_norm" in name for name in ops.names)
    assert any("lora" in name for name in ops.names) == (spec is not None)


def test_graphs_do_not_multiply_with_the_adapters() -> None:
    """vLLM #16961, #23777 and #36370: minutes of captures, one for each number of adapters."""
    counts = [len(batch_shapes(256, loras, 4096)) for loras in (1, 4, 32, 256)]
    assert max(counts) <= 3 * len(token_sizes(256))


@pytest.mark.parametrize("dtype", ["auto", "int8"])
@pytest.mark.parametrize("targets", [("gate_proj", "up_proj"), ("k_proj",), ("v_proj",)], ids=str)
def test_an_adapter_that_overflows_fails_alone(
    world: World, tmp_path: Path, dtype: str, targets: tuple[str, ...]
) -> None:
    """NaN of one tenant's adapter in a shared batch: its own request ends, and says why."""
    folder = write_adapter(tmp_path / "huge", TINY, rank=8, targets=targets)
    change_tensors(folder, lambda ts: [t.mul_(1e22) for t in ts.values()])
    names = (None, "a", "b")
    jobs = [world.job(name, 30, 8, i) for i, name in enumerate(names)]
    wanted = [facts(o) for o in run(world.engine("a", "b", kv_cache_dtype=dtype), jobs)]
    engine = world.engine("a", "b", kv_cache_dtype=dtype, max_num_batched_tokens=48)
    engine.load_adapter("huge", folder)
    *others, broken = run(engine, [*jobs, world.job("huge", 30, 8)])
    assert [facts(output) for output in others] == wanted
    assert broken.outputs[0].finish_reason == FinishReason.ERROR.value
    assert broken.error is not None
    assert "not finite" in broken.error
    world.check(world.engine("a"), [world.job("a")])
    again = run(engine, [jobs[1]])[0]
    assert facts(again) == wanted[1]
