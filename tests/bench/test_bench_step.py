"""The profile of a step: its parts have names and add up."""

from __future__ import annotations

from pathlib import Path

import pytest
from work import Work

import multilora_kernels as mk


@pytest.mark.skipif(not mk.HAS_CPP, reason="the C++ library is not built")
def test_a_steps_parts_are_named_and_add_up(tmp_path: Path) -> None:
    from bench_step import REST, SAMPLING, STEP, Ours, floors, profile
    from models import write_all
    from work import adapters_of, prompts

    work = Work("tiny", tmp_path)
    write_all(work)
    peer, adapters = Ours(work, "fp32", 1, {}), adapters_of("distinct", 3)
    rows = prompts(3, 8, work.shape.vocab)
    parts, context = profile(peer.llm.engine, work.shape, rows, adapters, 2)
    linears = {f"linear {site}" for site in ("qkv", "o", "gate_up", "down", "lm_head")}
    assert linears | {"lora_", "paged_attention", SAMPLING, REST, STEP} <= set(parts)
    assert linears <= set(floors(work.shape, "fp32", adapters, context))
    assert all(seconds >= 0 for seconds in parts.values())
    assert parts[STEP] >= parts["lora_"] + parts["paged_attention"]
    assert not peer.llm.engine.has_work
