"""The engine on the device in bf16: against the CPU in fp32, and in all its ways to run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch

from multilora.device.cpu import Device
from multilora.engine.engine import Engine
from multilora.outputs import RequestOutput
from multilora.sampling_params import SamplingParams
from tests.harness.adapter_folders import write_adapter
from tests.harness.gpu_rehearsal import REHEARSED, cpu_ops
from tests.harness.model_folders import TINY, write_checkpoint
from tests.harness.tiny_engines import Job, facts, make_engine, prompt_of, run

pytestmark = pytest.mark.gpu

SHAPE = {
    "hidden_size": 64 if REHEARSED else 256,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 16 if REHEARSED else 64,
    "intermediate_size": 96 if REHEARSED else 512,
    "vocab_size": 512,
}
STEP = 3 if REHEARSED else 9  # tokens that a prompt is longer than the one before
TOKENS = 4 if REHEARSED else 12  # of an answer
RANKS = {"a": 8, "b": 16, "c": 64}
SPECS: tuple[Any, ...] = (None, "a", "b", "c", {"a": 0.5, "c": -0.5}, "head", "full", "embed")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpu")
    write_checkpoint(folder / "base", dtype=torch.bfloat16, **SHAPE)
    config = replace(TINY, **SHAPE)
    for name, rank in RANKS.items():
        write_adapter(folder / name, config, rank=rank, seed=rank, scale=0.05)
    for name, target in (("head", "lm_head"), ("embed", "embed_tokens")):
        targets = ("q_proj", target)
        write_adapter(folder / name, config, rank=8, seed=1, scale=0.05, targets=targets)
    write_adapter(
        folder / "full",
        config,
        rank=8,
        seed=2,
        scale=0.05,
        targets=("q_proj", "v_proj", "down_proj"),
        use_dora=True,
        modules_to_save=["norm", "lm_head"],
        trainable_token_indices=range(0, 512, 3),
    )
    return folder


def engine_of(root: Path, device: Device | str, **settings: Any) -> Engine:
    name = device if isinstance(device, str) else "cuda"
    adapters = {n: root / n for n in (*RANKS, "head", "embed", "full")}
    wide = {"max_loras": 8, "max_num_seqs": 8 if REHEARSED else 24, "num_kv_blocks": 256}
    wide |= {"lora_scales": True, "max_lora_token_rows": 512}
    return make_engine(root / "base", adapters, device=name, **{**wide, **settings})


def jobs(**fields: Any) -> list[Job]:
    base = {"max_tokens": TOKENS, "ignore_eos": True, "temperature": 0, **fields}
    return [
        Job(prompt_of(7 + STEP * i, seed=i, vocab=512), SamplingParams(**{"seed": i, **base}), spec)
        for i, spec in enumerate(SPECS)
    ]


@pytest.fixture(scope="module")
def plain(root: Path, device: Device) -> list[RequestOutput]:
    """The answers without graphs and steps ahead."""
    return run(engine_of(root, device, enforce_eager=True, async_scheduling=False), jobs())


def scores(output: RequestOutput) -> list[float]:
    """The log probability of each prompt token."""
    assert output.prompt_logprobs is not None
    pairs = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
    return [found[token].logprob for token, found in pairs if found is not None]


def test_log_probabilities_are_those_of_the_cpu_in_fp32(root: Path, device: Device) -> None:
    ours = run(engine_of(root, device), jobs(prompt_logprobs=0))
    with cpu_ops():
        exact = run(
            engine_of(root, "cpu", dtype="float32", lora_dtype="float32"), jobs(prompt_logprobs=0)
        )
    for mine, theirs in zip(ours, exact, strict=True):
        gaps = [abs(a - b) for a, b in zip(scores(mine), scores(theirs), strict=True)]
        assert mean(gaps) < 0.02
        assert max(gaps) < 0.2


@pytest.mark.parametrize(
    "settings",
    [
        {"enforce_eager": True},
        {"async_scheduling": False},
        {},
        {"overlap_lora": False},
        {"num_kv_blocks": 40},
    ],
    ids=str,
)
def test_every_way_to_run_gives_the_same_answers(
    root: Path, device: Device, plain: list[RequestOutput], settings: dict[str, Any]
) -> None:
    found = run(engine_of(root, device, **settings), jobs())
    same = [
        sum(a == b for a, b in zip(x.outputs[0].token_ids, y.outputs[0].token_ids, strict=True))
        for x, y in zip(found, plain, strict=True)
    ]
    # Greedy answers of a random model part at the first near tie; most have none.
    assert sum(same) >= 0.8 * TOKENS * len(SPECS)


def test_e4m3_pages_change_little(root: Path, device: Device) -> None:
    found = run(engine_of(root, device, kv_cache_dtype="fp8"), jobs(prompt_logprobs=0))
    with cpu_ops():
        exact = run(
            engine_of(root, "cpu", dtype="float32", lora_dtype="float32"), jobs(prompt_logprobs=0)
        )
    for mine, theirs in zip(found, exact, strict=True):
        gaps = [abs(a - b) for a, b in zip(scores(mine), scores(theirs), strict=True)]
        assert mean(gaps) < 0.08


def test_batch_invariant_answers_do_not_depend_on_the_batch(root: Path, device: Device) -> None:
    engine = engine_of(root, device, batch_invariant=True)
    work = jobs(temperature=1.0, logprobs=3)
    together = [facts(output) for output in run(engine, work)]
    alone = [facts(run(engine, [job])[0]) for job in work]
    assert together == alone


def test_sampling_is_seeded_by_request_and_position(root: Path, device: Device) -> None:
    engine = engine_of(root, device)
    draws = [
        [o.outputs[0].token_ids for o in run(engine, jobs(temperature=1.0, top_p=0.9))]
        for _ in range(2)
    ]
    assert draws[0] == draws[1]
