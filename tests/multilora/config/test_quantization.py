"""Which linears get which bits."""

from __future__ import annotations

from multilora.config.engine import EngineConfig
from multilora.config.quantization import Scheme, schemes_of


def test_int8_is_per_output_and_int4_in_groups_of_32_beside_an_int8_head() -> None:
    sites = ("qkv", "o", "gate_up", "down")
    assert schemes_of(EngineConfig(model="x")) == {}
    eight = schemes_of(EngineConfig(model="x", quantization="int8"))
    assert eight == dict.fromkeys((*sites, "lm_head"), Scheme(8, None))
    four = schemes_of(EngineConfig(model="x", quantization="int4"))
    assert four == {**dict.fromkeys(sites, Scheme(4, 32)), "lm_head": Scheme(8, None)}
    grouped = schemes_of(EngineConfig(model="x", quantization="int8", quantization_group_size=128))
    assert set(grouped.values()) == {Scheme(8, 128)}


def test_a_group_size_that_is_given_is_that_of_int4_as_well() -> None:
    found = schemes_of(EngineConfig(model="x", quantization="int4", quantization_group_size=64))
    assert found["qkv"] == Scheme(4, 64)
    assert found["lm_head"] == Scheme(8, None)
