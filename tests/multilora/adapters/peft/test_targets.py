"""Which modules an adapter changes: PEFT's own matching functions are the oracle."""

from __future__ import annotations

import re
import time
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from multilora.adapters.peft.config import LoraSpec
from multilora.adapters.peft.targets import find_targets
from multilora.config.lora_sites import sites_of
from multilora.config.model import ModelConfig
from multilora.errors import AdapterInvalid

CONFIG = ModelConfig(
    hidden_size=32,
    num_layers=12,  # so that one layer number is the end of another
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=48,
    vocab_size=64,
    max_position_embeddings=128,
    rms_norm_eps=1e-5,
    rope_theta=10_000.0,
)
SITES = sites_of(CONFIG)
PATHS = [
    site.module_path(layer, index)
    for site in SITES.values()
    for layer in range(site.layers)
    for index in range(len(site.slices))
]


def spec(**fields: Any) -> LoraSpec:
    base: dict[str, Any] = {
        "rank": 8,
        "alpha": 16.0,
        "rslora": False,
        "targets": frozenset({"q_proj"}),
        "exclude": frozenset(),
        "layers": None,
        "layers_patterns": (),
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    return LoraSpec(**{**base, **fields})


ENDINGS = st.sampled_from(PATHS).flatmap(
    lambda path: st.integers(0, path.count(".")).map(lambda n: path.split(".", n)[-1])
)
EXPRESSIONS = st.sampled_from(
    [
        r".*_proj",
        r"q_proj|v_proj",
        r".*\.(q|k)_proj",
        r"model\.layers\.\d\.mlp\..*",
        r"^model.layers.1.self_attn.q_proj",
        r"self.attn.q_proj",
        r"[0-3]\.self_attn\..*",
        r"1.mlp.up_proj",
        r"lm_head",
        r"(.*\.)?embed_tokens",
        r"a)|(.*q_proj",
        r"",
    ]
)


def _compiles(expression: str) -> bool:
    try:
        re.compile(expression)
    except re.error:
        return False
    return True


NAMES = st.lists(ENDINGS | st.sampled_from(["q", "proj", "c_attn"]), max_size=4).map(frozenset)
LAYERS_PATTERNS = st.sampled_from(["layers", "h", "layer.", "model.layers", r"\w+"])


@pytest.mark.seconds
@settings(max_examples=100)
@given(data=st.data())
def test_matches_as_peft_does(data: Any) -> None:
    tuners = pytest.importorskip("peft.tuners.tuners_utils")
    other = pytest.importorskip("peft.utils.other")
    targets = data.draw(NAMES | EXPRESSIONS.filter(_compiles))
    exclude = data.draw(NAMES | EXPRESSIONS.filter(_compiles))
    layers, patterns = None, ()
    if not isinstance(targets, str):
        layers = data.draw(st.none() | st.frozensets(st.integers(-1, 13), min_size=1, max_size=4))
        patterns = tuple(data.draw(st.lists(LAYERS_PATTERNS, max_size=2))) if layers else ()
    ranks = data.draw(st.dictionaries(ENDINGS | EXPRESSIONS, st.integers(1, 64), max_size=5))

    peft_config = SimpleNamespace(
        target_modules=targets,
        exclude_modules=exclude,
        layers_to_transform=sorted(layers) if layers else None,
        layers_pattern=list(patterns),
        modules_to_save=None,
        target_parameters=None,
    )
    want = {
        path: ranks.get(other.get_pattern_key(ranks, path), 8)
        for path in PATHS
        if tuners.check_target_module_exists(peft_config, path)
    }
    ours = spec(
        targets=targets,
        exclude=exclude,
        layers=layers,
        layers_patterns=patterns,
        rank_pattern=ranks,
    )
    if not want:
        with pytest.raises(AdapterInvalid, match="names no module"):
            find_targets(ours, SITES, 64)
    else:
        assert {path: t.rank for path, t in find_targets(ours, SITES, 64).items()} == want


def test_says_which_modules_there_are_when_none_is_named() -> None:
    with pytest.raises(AdapterInvalid, match=r"\['c_attn'\].*names no module.*q_proj, k_proj"):
        find_targets(spec(targets=frozenset({"c_attn"})), SITES, 64)


EXPLOSIVE = [
    r"(?:.|.|.)*(?:.|.|.)*[^\w.]",
    r".*.*.*.*.*.*.*.*.*.*.*.*(.)\1\1",
    r"(?R)?x|(?R)",
    r"(?=(.+)+)(?:(?:.|.)+)+\1$",
    r"(((((((((a{9}){9}){9}){9}){9}){9}){9}){9}){9})",
    r"(?:(?:a{1000}){1000}){1000}",
    r"a{99999999}",
    "(" * 500 + ")" * 500,
    "a" * 100_000,
]
MALFORMED = [r"(", r"[", r"(?P<a", r"\L<x>", r"a{3,1}", r"(?<=a", "(?z)"]


FIELDS = ["targets", "exclude", "layers_patterns", "rank_pattern", "alpha_pattern"]


@pytest.mark.parametrize(
    ("field", "pattern"),
    [
        *(("targets", pattern) for pattern in EXPLOSIVE + MALFORMED),
        *((field, pattern) for field in FIELDS[1:] for pattern in (EXPLOSIVE[0], MALFORMED[0])),
    ],
    ids=lambda text: text[:20],
)
def test_hostile_expressions_are_refused_in_time(field: str, pattern: str) -> None:
    value: Any = {
        "layers_patterns": (pattern,),
        "rank_pattern": {pattern: 1},
        "alpha_pattern": {pattern: 1.0},
    }.get(field, pattern)
    hostile = spec(**{field: value, **({"layers": frozenset({1})} if "layers" in field else {})})
    name = {
        "targets": "target_modules",
        "exclude": "exclude_modules",
        "layers_patterns": "layers_pattern",
    }.get(field, field)
    start = time.thread_time()
    with pytest.raises(AdapterInvalid, match=f"{name}: "):
        find_targets(hostile, SITES, 64)
    assert time.thread_time() - start < 1


def test_a_hundred_thousand_patterns_are_refused_in_time() -> None:
    start = time.thread_time()
    with pytest.raises(AdapterInvalid, match="rank_pattern: its expressions take more than"):
        find_targets(spec(rank_pattern={f"x{i}": 1 for i in range(100_000)}), SITES, 64)
    assert time.thread_time() - start < 1


def test_one_pattern_for_each_module_is_cheap() -> None:
    """As PEFT's EVA writes it; matched pair by pair it would be 300,000 matches at 80 layers."""
    ranks = {path: 1 + index % 64 for index, path in enumerate(PATHS)}
    found = find_targets(spec(targets=".*", rank_pattern=ranks), SITES, 64)
    assert {path: target.rank for path, target in found.items()} == ranks
