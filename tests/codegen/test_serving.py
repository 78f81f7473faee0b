"""Nothing is compiled while serving: random requests need no variant that start-up did not make."""

from __future__ import annotations

import logging
import random
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
import torch
import triton

from multilora.runtime.graph_runner import GraphRunner
from multilora.runtime.model_runner import ModelRunner
from multilora.sampling_params import SamplingParams
from multilora_kernels.cuda import attention
from multilora_kernels.cuda.launch_plans import LaunchPlans
from tests.harness import dry_launches
from tests.harness.adapter_folders import write_adapter
from tests.harness.model_folders import TINY, write_checkpoint
from tests.harness.tiny_engines import drain, greedy, make_engine, prompt_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from multilora.engine.engine import Engine
    from multilora_kernels.testing.variants import Key

RANKS = {"a": 8, "b": 16, "c": 64}
ONE_SITE = {"q": "q_proj", "head": "lm_head", "embed": "embed_tokens"}
SPECS: tuple[Any, ...] = (
    None, None, "a", "b", "c", "q", "head", "embed", "rows",
    {"a": 0.5, "c": -0.5}, {"b": 1.0, "head": 2.0},
)  # fmt: skip
# Enough rows and sequences for every kind: see `SEQ_BLOCKS` and `LaunchPlans.row_bounds`.
WIDE = {
    "device": "cuda",
    "max_num_seqs": 150,
    "max_num_batched_tokens": 320,
    "num_kv_blocks": 700,
    "max_loras": 6,
    "max_model_len": 512,
    "overlap_lora": False,  # one op, which launches the same kernels; the CPU's two are slow
}


KINDS = (
    "eager", "graph", "many rows", "many sequences", "one sequence", "many logits", "aborts",
)  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serving")
    write_checkpoint(folder / "base", dtype=torch.bfloat16)
    for name, rank in RANKS.items():
        write_adapter(folder / name, TINY, rank=rank, seed=rank)
    write_adapter(
        folder / "rows", TINY, seed=2, modules_to_save=["lm_head"], trainable_token_indices=[1, 2]
    )
    write_adapter(folder / "norms", TINY, seed=3, use_dora=True, modules_to_save=["norm"])
    for name, target in ONE_SITE.items():
        write_adapter(folder / name, TINY, rank=24, seed=1, targets=(target,))
    return folder


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    dry_launches.install(monkeypatch)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # products are tiny: threads would wait for each other
    yield
    torch.set_num_threads(threads)


def engine_of(root: Path, **settings: Any) -> Engine:
    folders = {name: root / name for name in (*RANKS, *ONE_SITE, "rows")}
    engine = make_engine(root / "base", folders, **{**WIDE, **settings})
    if engine.config.lora_scales:
        engine.load_adapter("q", root / "norms")
    return engine


class Traffic:
    """Requests that come, stay and go at random; what the steps were like."""

    def __init__(self, engine: Engine, seed: int, patch: pytest.MonkeyPatch) -> None:
        self.engine, self.random = engine, random.Random(seed)
        self.seen: Counter[str] = Counter()
        forward, run = ModelRunner._forward, GraphRunner.run

        def forwarded(
            runner: ModelRunner, sent: Any, shape: Any, *rest: Any, **options: Any
        ) -> Any:
            self.seen["eager"] += 1
            self.seen["many rows"] += shape.tokens > 256
            self.seen["many sequences"] += shape.seqs > 128
            self.seen["one sequence"] += shape.seqs == 1
            self.seen["many logits"] += shape.logits > 64
            return forward(runner, sent, shape, *rest, **options)

        def replayed(graphs: GraphRunner, *args: Any) -> Any:
            self.seen["graph"] += 1
            return run(graphs, *args)

        patch.setattr(ModelRunner, "_forward", forwarded)
        patch.setattr(GraphRunner, "run", replayed)

    def run(self, steps: int) -> None:
        """So many steps that compute something."""
        while self.seen["steps"] < steps:
            self.arrive()
            if self.random.random() < 0.1 and self.engine.has_work:
                self.engine.abort(self.random.choice(self.engine.request_ids))
                self.seen["aborts"] += 1
            for _ in range(self.random.choice((1, 2, 3, 10))):
                self.seen["steps"] += self.engine.has_work
                self.engine.step()

    def arrive(self) -> None:
        """A few requests, or many short ones at once, if there is room for more."""
        limit = self.engine.config.max_num_seqs
        many = self.random.random() < 0.05
        for _ in range(limit if many else self.random.choice((0, 1, 1, 3))):
            if len(self.engine.request_ids) < limit + 4:
                self.request(3 if many else self.random.choice((1, 2, 5, 17, 60, 300)))

    def request(self, most: int) -> None:
        length, chance = self.random.randint(1, most), self.random.random
        params = SamplingParams(
            temperature=self.random.choice((0.0, 1.0)),
            top_k=self.random.choice((0, 5)),
            repetition_penalty=self.random.choice((1.0, 1.0, 1.2)),
            seed=self.random.randrange(100),
            n=2 if chance() < 0.1 else 1,
            max_tokens=self.random.randint(1, 12),
            ignore_eos=chance() < 0.5,
            logprobs=2 if chance() < 0.2 else None,
            prompt_logprobs=1 if chance() < 0.15 else None,
        )
        self.seen["prompt logprobs"] += params.prompt_logprobs is not None
        prompt = prompt_of(length, seed=self.random.randrange(5))
        self.engine.add_request(prompt, params, adapter=self.random.choice(SPECS))

    def rarities(self) -> None:
        """What is rare: many logits of an adapted head, a prompt beside many rows."""
        scored = SamplingParams(max_tokens=1, prompt_logprobs=1)
        self.engine.add_request(prompt_of(310, seed=9), scored, adapter="head")
        drain(self.engine)
        for i in range(140):
            self.engine.add_request(prompt_of(2, seed=i), greedy(9))
        for _ in range(3):
            self.engine.step()
        fresh = prompt_of(40, seed=self.random.randrange(10, 10**6))  # not in the prefix cache
        self.engine.add_request(fresh, greedy(2))
        drain(self.engine)


def serve(
    root: Path, steps: int, patch: pytest.MonkeyPatch, seed: int = 0, **settings: Any
) -> tuple[Traffic, list[Key], list[Key]]:
    """So many steps of traffic; what start-up compiled, and what was compiled later."""
    with dry_launches.launching() as keys:
        engine = engine_of(root, **settings)
        ready = len(keys)
        traffic = Traffic(engine, seed, patch)
        traffic.run(steps)
        traffic.rarities()
    return traffic, keys[:ready], keys[ready:]


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        r.getMessage() for r in caplog.records if r.name == "multilora_kernels.cuda.compilations"
    ]


def test_random_requests_compile_nothing_and_need_all_that_was_compiled(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "multilora"):
        traffic, ready, late = serve(root, 300, monkeypatch)
    assert late == []
    assert traffic.engine.stats.late_compilations == 0
    assert not warnings(caplog)
    assert all(traffic.seen[kind] > 1 for kind in KINDS), traffic.seen
    graphs = len(traffic.engine.runner.graphs or ())
    said = f"compiled {len(ready)} kernel variants or found them in Triton's cache, "
    assert any(m.startswith(f"{said}captured {graphs} graphs in ") for m in caplog.messages)
    with dry_launches.launching() as needed:  # as if nothing were compiled
        traffic.run(500)
        traffic.rarities()
    assert set(needed) == set(ready)
    assert traffic.engine.stats.late_compilations == len(needed)


MODES: tuple[dict[str, Any], ...] = (
    {"batch_invariant": True},
    {"kv_cache_dtype": "fp8"},
    {"lora_dtype": "float32", "dtype": "float16", "block_size": 32},
    {
        "overlap_lora": None,
        "max_num_seqs": 12,
        "max_num_batched_tokens": 48,
        "max_loras": 2,
        "lora_pages": 16,
    },
    {"lora_scales": True, "max_loras": 4},
    {"max_num_seqs": 5, "max_num_batched_tokens": 7, "max_lora_rank": 72, "num_kv_blocks": 90},
)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_other_ways_to_run_compile_nothing(
    root: Path, mode: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    traffic, ready, late = serve(root, 100, monkeypatch, enforce_eager=True, **mode)
    assert late == []
    assert traffic.engine.stats.late_compilations == 0
    assert len(ready) > 10


@pytest.mark.slow
@pytest.mark.parametrize("mode", [{}, *MODES], ids=str)
def test_a_long_life_compiles_nothing(
    root: Path, mode: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    traffic, _, late = serve(root, 3000, monkeypatch, seed=1, **mode)
    assert late == []
    assert traffic.engine.stats.late_compilations == 0


# Planted faults -----------------------------------------------------------------------------------


def test_a_constant_that_follows_the_batch_is_found_and_its_kernels_named(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(attention, "seq_block", triton.next_power_of_2)
    traffic, _, late = serve(root, 40, monkeypatch, enforce_eager=True)
    kernels = {key.kernel for key in late}
    assert kernels == {"_split_kernel", "_chunk_kernel", "merge_kernel"}
    assert traffic.engine.stats.late_compilations == len(late) == len(warnings(caplog))
    for kernel in kernels:
        assert any(f"Triton compiled {kernel} while requests waited" in m for m in warnings(caplog))
    assert any("BLOCK_SEQS=4" in message for message in warnings(caplog))


def test_a_kind_of_step_that_start_up_leaves_out_is_found(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LaunchPlans, "row_bounds", lambda plans: [])
    traffic, _, late = serve(root, 100, monkeypatch, enforce_eager=True)
    # Of the sites in layers the profile run has launched the widest kind; not of the embedding.
    assert {key.kernel for key in late} == {"_expand_kernel"}
    assert traffic.engine.stats.late_compilations == len(late)
