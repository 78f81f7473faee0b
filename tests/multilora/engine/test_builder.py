"""From settings to an engine: devices, memory, and a GPU's defaults on a stand-in for one."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

import multilora_kernels as mk
from multilora.config.engine import EngineConfig
from multilora.config.lora_sites import sites_of
from multilora.config.presets import SHAPES
from multilora.device.cpu import Device, DeviceMemory
from multilora.device.cuda import CudaDevice
from multilora.engine import builder
from multilora.engine.engine import Engine
from multilora.errors import ConfigError
from multilora.model.kv_cache import KVCache
from multilora.model.llama import Llama
from multilora.sampling_params import SamplingParams
from tests.harness.adapter_folders import write_adapter
from tests.harness.fake_cuda import FakeCuda, install
from tests.harness.model_folders import TINY, write_checkpoint
from tests.harness.tiny_engines import Job, facts, make_engine, prompt_of, run

if TYPE_CHECKING:
    from collections.abc import Callable

    from multilora.model.forward_batch import ForwardBatch

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


@pytest.mark.seconds
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
    captures = [call.partition(" on ")[2] for call in calls if call.startswith("capture")]
    assert captures == 3 * ["stream 1"]
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


@pytest.mark.seconds
def test_an_engine_on_a_cpu_needs_no_triton(root: Path, run_python: Callable[..., str]) -> None:
    code = f"""
import sys
from multilora import Engine, EngineConfig
engine = Engine(EngineConfig(model={str(root / "base")!r}, skip_tokenizer_init=True))
engine.add_request([5, 6, 7])
engine.step()
print('triton' in sys.modules, engine.stats.late_compilations)
"""
    assert run_python(code).split() == ["False", "0"]


@pytest.mark.seconds
def test_a_gpu_is_warmed_up_before_its_graphs_are_captured(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    install(monkeypatch)
    monkeypatch.setattr(builder, "open_device", lambda name: FakeCuda())
    with caplog.at_level(logging.INFO, "multilora"):
        engine = engine_of(root, device="cuda")
    # 8 requests and 64 tokens at most: one kind of step, graphs of 16 rows and three tile sizes.
    assert caplog.messages[-1].startswith(
        "compiled 0 kernel variants or found them in Triton's cache, captured 3 graphs in "
    )
    pools = {name: engine.store.pool(name).is_allocated for name in sites_of(TINY)}
    assert not pools["embed"]
    assert pools["qkv"]
    assert engine.stats.late_compilations == 0


@pytest.mark.seconds
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


# What does not fit --------------------------------------------------------------------------------


def shapes_engine(name: str, **settings: Any) -> Engine:
    return Engine(
        EngineConfig(model=name, load_format="dummy", skip_tokenizer_init=True, **settings)
    )


@pytest.fixture
def _nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builder, "load_random", lambda *_: pytest.fail("too late"))
    monkeypatch.setattr(builder, "load_checkpoint", lambda *_: pytest.fail("too late"))


@pytest.mark.usefixtures("_nothing_is_loaded")
def test_a_gpu_that_is_too_small_is_said_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The stand-in has 80 GB, of which others have 20."""
    install(monkeypatch)
    monkeypatch.setattr(builder, "open_device", lambda name: FakeCuda())
    with pytest.raises(ConfigError, match=r"weights 141\.11 GB.*may take 52\.00 GB.*use a GPU"):
        shapes_engine("llama-3.1-70b", device="cuda")
    with pytest.raises(ConfigError, match=r"29\.82 GB \(lora_pages=1440\).*Lower max_model_len to"):
        shapes_engine("llama-3.1-70b:8", device="cuda", lora_pages=1440)


@pytest.mark.usefixtures("_nothing_is_loaded")
def test_a_machine_that_is_too_small_is_said_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(builder, "host_memory", lambda: DeviceMemory(15 * 10**9, 16 * 10**9))
    with pytest.raises(ConfigError, match=r"need 16\.06 GB, and this machine has 16\.00 GB; set"):
        shapes_engine("llama-3.1-8b")


def test_a_machine_that_says_nothing_of_its_memory_is_tried(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builder, "host_memory", lambda: None)
    engine_of(root)


@pytest.mark.parametrize(
    "where", ["load_checkpoint", "ModelRunner.profile_run", "ModelRunner.capture"]
)
def test_a_gpu_that_runs_out_of_memory_is_said_with_what_was_expected(
    root: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    install(monkeypatch)
    monkeypatch.setattr(builder, "open_device", lambda name: FakeCuda())

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. ...")

    monkeypatch.setattr(f"multilora.engine.builder.{where}", fail)
    with pytest.raises(ConfigError, match=r"ran out \(CUDA out of memory\)\. .* weights 0\.00 GB"):
        engine_of(root, device="cuda")


@pytest.mark.parametrize(
    ("settings", "lens", "tokens"),
    [
        ({}, [64], 64),
        ({"max_num_batched_tokens": 600}, [256, 256, 88], 608),
        ({"max_num_batched_tokens": 600, "max_num_seqs": 2}, [256, 256], 512),
    ],
)
def test_the_largest_step_is_tried_with_lora_and_all_rows(
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, int],
    lens: list[int],
    tokens: int,
) -> None:
    install(monkeypatch)
    monkeypatch.setattr(builder, "open_device", lambda name: FakeCuda())
    steps: list[ForwardBatch] = []
    planes: set[tuple[int, ...]] = set()
    forward, shrink = Llama.forward, mk.lora_shrink

    def spy(model: Llama, batch: ForwardBatch, cache: KVCache) -> torch.Tensor:
        steps.append(replace(batch, seq_lens=batch.seq_lens.clone()))
        return forward(model, batch, cache)

    def spy_shrink(*args: Any) -> torch.Tensor:
        found = shrink(*args)
        if len(steps) == 1:  # the others warm up
            planes.add(tuple(found.shape))
        return found

    monkeypatch.setattr(Llama, "forward", spy)
    monkeypatch.setattr(mk, "lora_shrink", spy_shrink)
    engine = engine_of(root, device="cuda", enforce_eager=True, **settings)
    step = steps[0]
    rows = engine.config.max_num_seqs
    assert step.seq_lens.tolist() == lens + [0] * (rows - len(lens))
    assert step.block_table.shape == (rows, 16)
    assert (len(step.ids), step.max_query_len, step.max_seq_len) == (tokens, max(lens), 256)
    assert step.logits_rows is not None
    assert len(step.logits_rows) == 16
    assert step.lora.keys() == {"qkv", "o", "gate_up", "down"}
    assert planes == {(1, tokens, slices * 512) for slices in (1, 2, 3)}


def test_end_tokens_that_the_model_has_no_row_for_are_left_out_and_said(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shape = replace(TINY, eos_token_ids=(2, TINY.vocab_size, TINY.vocab_size + 7))
    assert builder._end_ids(shape, None) == {2}
    assert f"[{TINY.vocab_size}, {TINY.vocab_size + 7}]" in caplog.text
    caplog.clear()
    assert builder._end_ids(replace(TINY, eos_token_ids=(2,)), None) == {2}
    assert not caplog.text


def test_a_kind_of_device_is_enough_to_reckon_with() -> None:
    """Without a GPU: its graphs and its number of rank pages, not a CPU's."""
    config = EngineConfig(model="x", max_model_len=4096, kv_cache_dtype="fp8")
    shape = SHAPES["llama-3.1-8b"]
    on_cpu, on_gpu = (
        builder.reckon(config, Device, shape),
        builder.reckon(config, CudaDevice, shape),
    )
    assert on_cpu.dtypes == on_gpu.dtypes
    assert on_gpu.dtypes == (torch.bfloat16, torch.bfloat16, torch.float8_e4m3fn)
    assert on_cpu.max_model_len == on_gpu.max_model_len == 4096
    assert on_cpu.needs.graphs == 0 < on_gpu.needs.graphs
    assert on_cpu.needs.rank_pages == 2 * on_gpu.needs.rank_pages
    eager = replace(config, enforce_eager=True)
    assert builder.reckon(eager, CudaDevice, shape).needs.graphs == 0
