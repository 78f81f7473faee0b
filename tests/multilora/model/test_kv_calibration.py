"""Keys and values in int8 pages: where their scales come from, and what they change."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from multilora.model import kv_calibration
from multilora.model.kv_cache import KVCache
from tests.harness.adapter_folders import write_adapter
from tests.harness.model_folders import TINY, write_checkpoint
from tests.harness.tiny_engines import Job, facts, greedy, make_engine, prompt_of, run

if TYPE_CHECKING:
    from pathlib import Path

    from multilora.engine.engine import Engine
    from multilora.outputs import RequestOutput


@pytest.fixture
def base(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "base")
    write_adapter(tmp_path / "a", TINY, rank=8, seed=1, scale=0.05)
    return tmp_path / "base"


def engine_of(base: Path, kind: str = "int8", **settings: object) -> Engine:
    return make_engine(base, {"a": base.parent / "a"}, kv_cache_dtype=kind, **settings)


def jobs() -> list[Job]:
    params = greedy(6, prompt_logprobs=0, logprobs=0)
    return [Job(prompt_of(9 + 40 * i, seed=i), params, a) for i, a in enumerate((None, "a"))]


def scores(output: RequestOutput) -> list[float]:
    """The log probability of each prompt token but the first."""
    assert output.prompt_logprobs is not None
    rows = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
    return [row[token].logprob for token, row in rows if row is not None]


def test_answers_are_close_to_those_of_full_pages(base: Path) -> None:
    for found, wanted in zip(
        run(engine_of(base), jobs()), run(engine_of(base, "auto"), jobs()), strict=True
    ):
        gaps = torch.tensor(scores(found)) - torch.tensor(scores(wanted))
        assert 0 < gaps.abs().max() < 0.2
        assert gaps.abs().mean() < 0.05


def test_a_block_takes_a_quarter_of_fp32s_memory(base: Path) -> None:
    small, large = engine_of(base), engine_of(base, "auto")
    assert small.memory()["kv_capacity"] * 4 == large.memory()["kv_capacity"]
    assert KVCache.block_bytes(TINY, 16, torch.int8) * 4 == KVCache.block_bytes(
        TINY, 16, torch.float32
    )


def test_scales_hold_what_the_base_makes_of_any_text(base: Path) -> None:
    """Full pages after a request: all fits the codes, and the largest uses many of them."""
    engine = engine_of(base, "auto")
    scales = kv_calibration.calibrate(engine.model, 256, torch.int8)
    assert [s.shape for s in scales] == [(2, 2), (2, 2)]
    cache = engine.runner.cache
    for pages in (cache.k, cache.v):
        pages.zero_()
    run(engine, [Job(prompt_of(200, seed=5), greedy(1))])
    for pages, scale in zip((cache.k, cache.v), scales, strict=True):
        codes = pages.abs().amax((1, 2, 4)) / scale
        assert codes.max() <= 127
        assert codes.min() >= 127 / kv_calibration.MARGIN / 2


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_scales_depend_on_the_base_alone(base: Path, dtype: torch.dtype) -> None:
    first, second = (
        kv_calibration.calibrate(engine_of(base, **settings).model, 256, dtype)
        for settings in ({}, {"max_num_seqs": 1, "block_size": 32, "seed": 9})
    )
    assert all(map(torch.equal, first, second))


def test_a_head_without_values_has_a_scale(base: Path) -> None:
    engine = engine_of(base, "auto")
    qkv = engine.model.blocks[0].attention.qkv.base
    weight = torch.randn(128, 64)
    weight[64:] = 0  # keys and values
    qkv.weight = weight
    scales = kv_calibration.calibrate(engine.model, 256, torch.int8)
    assert all(scale[0].min() > 0 for scale in scales)


def test_a_model_shorter_than_the_text_is_measured_too(base: Path) -> None:
    engine = engine_of(base, max_model_len=20)
    assert run(engine, [Job(prompt_of(9), greedy(3))])[0].finished


def test_the_prefix_cache_gives_the_same_bits(base: Path) -> None:
    engine, job = engine_of(base), Job(prompt_of(70), greedy(6, logprobs=2))
    first, again = (facts(run(engine, [job])[0]) for _ in range(2))
    assert first == again
