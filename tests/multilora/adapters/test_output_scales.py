"""What adapters do beside their deltas, against the plain sums in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from multilora.adapters import output_scales
from multilora.adapters.output_scales import (
    PackedScales,
    ScaleRows,
    dora_gains,
    has_scales,
    pack_scales,
)
from multilora.adapters.peft.reader import read_adapter
from multilora.adapters.rank_pages import pack
from multilora.adapters.store import AdapterStore
from multilora.config.engine import EngineConfig
from multilora.config.lora_sites import sites_of
from multilora.errors import AdapterInvalid
from multilora.runtime.memory_needs import scale_bytes
from multilora_kernels import Table
from tests.harness.adapter_folders import CONFIG, LINEARS, write_adapter

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

BIASED = replace(CONFIG, attention_bias=True, mlp_bias=True)
SITES = sites_of(BIASED)


class Base:
    """Random linears."""

    def __init__(self, *, has_bias: bool = True) -> None:
        self.weights = {
            name: torch.randn(site.layers, site.out, site.in_) for name, site in SITES.items()
        }
        self.biases = {name: torch.randn(s.layers, s.out) for name, s in SITES.items()}
        self.has_bias = has_bias

    def columns(self, site: str, layer: int, first: int, last: int) -> Tensor:
        return self.weights[site][layer, first:last]

    def bias(self, site: str, layer: int) -> Tensor | None:
        return self.biases[site][layer] if self.has_bias and SITES[site].in_layers else None


@pytest.mark.parametrize("columns", [7, 4096])
def test_a_gain_is_the_magnitude_over_the_length(
    columns: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output_scales, "COLUMNS", columns)
    targets = (*LINEARS, "embed_tokens", "lm_head")
    folder = write_adapter(tmp_path, BIASED, targets=targets, use_dora=True, use_rslora=True)
    adapter, base = read_adapter(folder, BIASED), Base()
    assert has_scales(adapter)
    for name, site in SITES.items():
        gains = dora_gains(adapter, site, base)
        assert gains.keys() == {key for key in adapter.modules if key[0] == name}
        for key, gain in gains.items():
            module, start = adapter.modules[key], site.slice_starts[key[2]]
            weight = base.weights[name][key[1], start : start + len(module.b)].double()
            change = module.scale * (module.b.double() @ module.a.double())
            assert module.magnitude is not None
            wanted = module.magnitude.double() / (weight + change).norm(dim=1)
            torch.testing.assert_close(gain.double(), wanted, rtol=1e-5, atol=0)


def test_b_holds_the_gain_and_the_rest_is_a_factor_less_one(tmp_path: Path) -> None:
    plain = read_adapter(write_adapter(tmp_path / "a", BIASED, targets=("k_proj",)), BIASED)
    dora = read_adapter(
        write_adapter(tmp_path / "b", BIASED, targets=("k_proj",), use_dora=True), BIASED
    )
    site, base = SITES["qkv"], Base(has_bias=False)
    one, other = (pack(adapter, site, torch.float32, base) for adapter in (plain, dora))
    assert one is not None
    assert other is not None
    assert one.scales is None
    assert other.scales is not None
    assert other.scales.bias is None
    gain = other.scales.gain
    assert gain is not None
    first, last = site.slice_starts[1:3]
    assert not gain[:, :first].any()  # the slices without LoRA are as they were
    assert not gain[:, last:].any()
    layer_b = other.b[0, :, :, first:last]
    module = dora.modules["qkv", 0, 1]
    wanted = (module.b * (gain[0, first:last] + 1)[:, None]).T * module.scale
    torch.testing.assert_close(layer_b[0][: len(wanted)], wanted)


def test_a_zero_column_of_the_base_cannot_have_a_length(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path, BIASED, targets=("o_proj",), use_dora=True, scale=0.0)
    base = Base()
    base.weights["o"][1, 3] = 0
    with pytest.raises(AdapterInvalid, match=r"layers\.1\.self_attn\.o_proj is not finite"):
        dora_gains(read_adapter(folder, BIASED), SITES["o"], base)


BIASES: dict[str, dict[str, Any]] = {
    "of lora_B": {"lora_bias": True},
    "all": {"bias": "all"},
    "of targets": {"bias": "lora_only"},
    "both": {"bias": "all", "lora_bias": True},
    "dora": {"use_dora": True},
    "dora, all": {"use_dora": True, "bias": "all"},
}


@pytest.mark.parametrize("kind", BIASES)
def test_the_base_and_its_row_are_what_the_adapter_means(kind: str, tmp_path: Path) -> None:
    """`factor * (W x + b) + row` is `g W x + b'`: b' is trained or b, and has lora_B's."""
    folder = write_adapter(tmp_path, BIASED, targets=("q_proj", "v_proj"), **BIASES[kind])
    adapter, base = read_adapter(folder, BIASED), Base()
    assert has_scales(adapter)
    site = SITES["qkv"]
    gains = dora_gains(adapter, site, base)
    packed = pack_scales(adapter, site, gains, base)
    assert packed is not None
    for layer in range(site.layers):
        product = torch.randn(site.out, dtype=torch.float64)
        own = base.biases["qkv"][layer].double()
        wanted = product + own
        for index in range(3):
            part = slice(*site.slice_starts[index : index + 2])
            key = ("qkv", layer, index)
            gain = gains.get(key, torch.ones(1)).double()
            bias = adapter.biases.get(key, own[part]).double()
            wanted[part] = gain * product[part] + bias
            module = adapter.modules.get(key)
            if module is not None and module.bias is not None:
                wanted[part] += module.scale * module.bias.double()
        found = product + own
        if packed.gain is not None:
            found *= 1 + packed.gain[layer].double()
        if packed.bias is not None:
            found += packed.bias[layer].double()
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_an_adapter_without_them_has_none(tmp_path: Path) -> None:
    adapter = read_adapter(write_adapter(tmp_path, BIASED), BIASED)
    assert not has_scales(adapter)
    assert all(pack_scales(adapter, site, {}, Base()) is None for site in SITES.values())


def test_rows_of_slots_are_sums_and_take_memory_when_one_is_needed() -> None:
    site = SITES["qkv"]
    rows = ScaleRows(site, slots=3)
    none = Table(*(torch.zeros(3, 1),) * 2, torch.zeros(3))
    assert rows.table(none, 0) is none
    assert not rows.is_allocated
    rows.clear(1)
    gains = [torch.randn(site.layers, site.out) for _ in range(2)]
    bias = torch.randn(site.layers, site.out)
    rows.write(1, [(PackedScales(gains[0], None), 0.5), (PackedScales(gains[1], bias), -2.0)])
    assert [rows.has_row(slot) for slot in range(3)] == [False, True, False]
    for layer in range(site.layers):
        table = rows.table(none, layer)
        assert table.scale_row is not None
        assert table.scale is not None
        assert table.bias is not None
        assert table.scale_row.tolist() == [-1, 1, -1]
        assert table.scale.is_contiguous()
        wanted = 1 + 0.5 * gains[0][layer] - 2 * gains[1][layer]
        torch.testing.assert_close(table.scale[1], wanted)
        torch.testing.assert_close(table.bias[1], -2 * bias[layer])
    rows.write(1, [(PackedScales(None, bias), 1.0)])  # nothing of the old one is left
    scale = rows.table(none, 0).scale
    assert scale is not None
    assert bool((scale[1] == 1).all())
    rows.clear(1)
    assert not rows.has_row(1)
    assert rows.capacity_bytes == 2 * 4 * site.layers * 3 * site.out


def test_scales_without_memory_for_them_are_refused_with_the_cure(tmp_path: Path) -> None:
    adapter = read_adapter(write_adapter(tmp_path, BIASED, lora_bias=True), BIASED)
    for settings, is_gpu in (({}, True), ({"lora_scales": False}, False)):
        config = EngineConfig(model="m", **settings)
        store = AdapterStore(SITES, config, dtype=torch.float32, is_gpu=is_gpu)
        with pytest.raises(AdapterInvalid, match="restart with lora_scales=True"):
            store.load("a", adapter, served=Base())
        assert not store.infos()


def test_what_is_reserved_is_what_was_reckoned() -> None:
    found = []
    for lora_scales in (None, True):
        config = EngineConfig(model="m", max_loras=3, lora_scales=lora_scales)
        store = AdapterStore(SITES, config, dtype=torch.float32, is_gpu=True)
        store.reserve()
        assert all(rows.is_allocated is bool(lora_scales) for rows in store.table.scales.values())
        found.append(store.reserved_bytes)
    assert found[1] - found[0] == scale_bytes(BIASED, slots=3)
