"""From settings to an engine: devices, memory, and a GPU's defaults on a stand-in for one."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import multilora_kernels as mk
from multilora.engine import builder
from multilora.model.kv_cache import KVCache
from multilora.sampling_params import SamplingParams
from tests.adapters import write_adapter
from tests.checkpoints import TINY, write_checkpoint
from tests.engines import Job, facts, make_engine, prompt_of, run
from tests.fake_cuda import FakeCuda, install

if TYPE_CHECKING:
    from multilora.engine.engine import Engine

RANKS = {"a": 8, "b": 24}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("startup")
    write_checkpoint(folder / "base")
    for name, rank in RANKS.items():
        write_adapter(folder / name, TINY, rank=rank, seed=rank, scale=0.3)
    return folder


def jobs() -> list[Job]:
    return [
        Job(
            prompt_of(5 + 9 * i, seed=i),
            SamplingParams(
                temperature=i % 2,
                seed=i,
                max_tokens=3 + 2 * i,
                ignore_eos=True,
                frequency_penalty=i % 3 / 2,
                prompt_logprobs=1 if i == 4 else None,
                logprobs=2,
            ),
            adapter,
        )
        for i, adapter in enumerate((None, "a", "b", {"a": 0.5, "b": 1.0}, "a", None))
    ]


def engine_of(root: Path, **settings: object) -> Engine:
    return make_engine(root / "base", {name: root / name for name in RANKS}, **settings)


def test_a_gpus_way_to_run_gives_the_answers_of_a_cpu(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps ahead, graphs, the side stream and two memories, all by the defaults of a GPU."""
    wanted = run(engine_of(root), jobs())
    calls = install(monkeypatch)
    monkeypatch.setattr(builder, "open_device", lambda name: FakeCuda())
    found = run(engine_of(root, device="cuda"), jobs())
    assert [o.outputs[0].token_ids for o in found] == [o.outputs[0].token_ids for o in wanted]
    assert calls.count("replay") > 5
    assert calls.count("main waits for stream 0") > 20
    plain = run(engine_of(root, device="cuda", overlap_lora=False), jobs())
    assert [facts(o) for o in plain] == [facts(o) for o in wanted]


def test_a_gpus_memory_decides_the_blocks(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    install(monkeypatch)
    monkeypatch.setattr(builder, "open_device", lambda name: FakeCuda())
    # 0.29 x 80 GB, less 20 in use, 2 of activations and 1 GiB for graphs.
    with caplog.at_level(logging.INFO, "multilora"):
        engine = engine_of(
            root,
            device="cuda",
            num_kv_blocks=None,
            max_num_seqs=2000,
            max_model_len=2048,
            enforce_eager=True,
            gpu_memory_utilization=0.2753,
        )
    block = KVCache.block_bytes(TINY, 16, engine.model.embed.dtype)
    room = int(80e9 * 0.2753) - 20 * 10**9 - 2 * 10**9 - engine.memory()["adapter_capacity"]
    assert engine.pool.num_blocks == room // block
    assert engine.memory()["activations"] == 2 * 10**9
    assert engine.memory()["kv_capacity"] == engine.pool.num_blocks * block
    assert caplog.messages[0].startswith("memory: base 0.00 GB, activations 2.00 GB, rank pages")


@pytest.mark.parametrize("wanted", [False, True])
def test_batch_invariance_reaches_every_product_and_attention(
    root: Path, monkeypatch: pytest.MonkeyPatch, wanted: bool
) -> None:
    seen: dict[str, set[bool]] = {"linear": set(), "paged_attention": set()}
    for name, flags in seen.items():
        op = getattr(mk, name)

        def spy(*args: Any, op: Any = op, flags: set[bool] = flags, **kwargs: Any) -> Any:
            flags.add(kwargs["batch_invariant"])
            return op(*args, **kwargs)

        monkeypatch.setattr(mk, name, spy)
    engine = engine_of(root, batch_invariant=wanted)
    found = [facts(output) for output in run(engine, jobs())]
    assert seen == {"linear": {wanted}, "paged_attention": {wanted}}
    assert found == [facts(output) for output in run(engine_of(root), jobs())]
