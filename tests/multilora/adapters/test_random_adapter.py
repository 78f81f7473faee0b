"""Random adapters."""

from __future__ import annotations

import torch

from multilora.adapters.random_adapter import random_adapter
from multilora.config.lora_sites import sites_of
from tests.harness.model_folders import TINY


def test_adapters_differ_by_seed_and_rank_and_name_their_content() -> None:
    digests = [random_adapter(TINY, r, s).digest for r, s in ((8, 0), (8, 1), (16, 0), (8, 0))]
    assert len(set(digests)) == 3
    assert digests[0] == digests[3]
    assert random_adapter(TINY, 8, 0, sites=("o",)).rank_at("qkv") == 0


def test_every_slice_has_a_delta_of_a_few_percent() -> None:
    adapter = random_adapter(TINY, 8, 0, dtype=torch.float32)
    sites = [sites_of(TINY)[name] for name in ("qkv", "o", "gate_up", "down")]
    assert adapter.modules.keys() == {
        (site.name, layer, index)
        for site in sites
        for layer in range(TINY.num_layers)
        for index in range(len(site.slices))
    }
    for (name, _, _), module in adapter.modules.items():
        x = torch.randn(64, sites_of(TINY)[name].in_)
        assert 0.05 < float((x @ module.a.T @ module.b.T * module.scale).std()) < 0.2
