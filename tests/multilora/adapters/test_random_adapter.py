"""Random adapters."""

from __future__ import annotations

from multilora.adapters.random_adapter import random_adapter
from tests.harness.model_folders import TINY


def test_adapters_differ_by_seed_and_rank_and_name_their_content() -> None:
    digests = [random_adapter(TINY, r, s).digest for r, s in ((8, 0), (8, 1), (16, 0), (8, 0))]
    assert len(set(digests)) == 3
    assert digests[0] == digests[3]
    assert random_adapter(TINY, 8, 0, sites=("o",)).rank_at("qkv") == 0
