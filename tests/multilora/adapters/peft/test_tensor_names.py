"""Which tensors a config asks for, by their names, and why one that it does not is refused."""

from __future__ import annotations

import pytest

from multilora.adapters.peft.config import LoraSpec
from multilora.adapters.peft.targets import find_targets
from multilora.adapters.peft.tensor_names import check_names, sort_names, wanted_shapes
from multilora.adapters.peft.trained import find_trained
from multilora.config.lora_sites import sites_of
from multilora.errors import AdapterInvalid
from tests.harness.adapter_folders import CONFIG

Q = "model.layers.1.self_attn.q_proj"
SPEC = LoraSpec(
    rank=4,
    alpha=4.0,
    rslora=False,
    targets=frozenset({Q}),
    exclude=frozenset(),
    layers=None,
    layers_patterns=(),
    rank_pattern={},
    alpha_pattern={},
    saved=("model.norm", "lm_head"),
    token_ids={"embed_tokens": (3, 5)},
)
TRAINED = find_trained(SPEC, CONFIG)
WANTED = wanted_shapes(SPEC, find_targets(SPEC, sites_of(CONFIG), 64), TRAINED, CONFIG)
ROWS = "model.embed_tokens.token_adapter.trainable_tokens_delta"


def test_a_config_asks_for_its_tensors() -> None:
    assert {
        f"{Q}.lora_A.weight": (4, 32),
        f"{Q}.lora_B.weight": (32, 4),
        "model.norm.weight": (32,),
        ROWS: (2, 32),
    } == WANTED
    check_names({name: name for name in WANTED}, {"lm_head"}, WANTED, TRAINED, CONFIG)


@pytest.mark.parametrize(
    ("stored", "plain"),
    [
        (f"{Q}.lora_A.weight", f"{Q}.lora_A.weight"),
        (f"{Q}.lora_A.default.weight", f"{Q}.lora_A.weight"),
        ("model.embed_tokens.lora_embedding_A.x", "model.embed_tokens.lora_embedding_A"),
        (f"{Q}.lora_magnitude_vector.weight", f"{Q}.lora_magnitude_vector"),
        (f"{Q}.base_layer.bias", f"{Q}.bias"),
        (ROWS, ROWS),
    ],
)
def test_names_lose_what_means_nothing_outside_peft(stored: str, plain: str) -> None:
    assert sort_names([f"base_model.model.{stored}"]) == ({plain: f"base_model.model.{stored}"}, {})


def test_whole_weights_are_found_by_their_site() -> None:
    names = ["model.embed_tokens.base_layer.weight", "lm_head.weight"]
    found = sort_names(f"base_model.model.{name}" for name in names)[1]
    assert found == {
        "embed": "base_model.model.model.embed_tokens.base_layer.weight",
        "lm_head": "base_model.model.lm_head.weight",
    }
    with pytest.raises(AdapterInvalid, match="are one weight"):
        sort_names(f"base_model.model.lm_head.{end}" for end in ("weight", "base_layer.weight"))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model.layers.0.input_layernorm.weight", "modules_to_save does not name its module"),
        (ROWS.replace("model.embed_tokens", "lm_head"), "trainable_token_indices does not name"),
        ("model.layers.2.input_layernorm.weight", "has no layer 2"),
        ("score.weight", "has no such module"),
        ("x", "has no such module"),
    ],
)
def test_a_tensor_that_nobody_asked_for_says_why(name: str, words: str) -> None:
    names = {known: known for known in (*WANTED, name)}
    with pytest.raises(AdapterInvalid, match=words):
        check_names(names, {"lm_head"}, WANTED, TRAINED, CONFIG)


def test_missing_tensors_are_named() -> None:
    names = {name: name for name in WANTED if name != ROWS}
    with pytest.raises(AdapterInvalid, match=r"missing: 'lm_head.weight', 'model.embed_tokens"):
        check_names(names, {}, WANTED, TRAINED, CONFIG)
