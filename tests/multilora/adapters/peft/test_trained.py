"""Which modules PEFT would train in full, and which rows; what cannot be served says why."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from multilora.adapters.peft.config import LoraSpec
from multilora.adapters.peft.trained import TOKEN_PATHS, find_trained, trained_biases
from multilora.config.lora_sites import norm_paths
from multilora.errors import AdapterInvalid
from tests.harness.adapter_folders import CONFIG

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")
TIED = replace(CONFIG, tie_word_embeddings=True)


def spec(**fields: Any) -> LoraSpec:
    return LoraSpec(8, 8.0, False, "all-linear", frozenset(), None, (), {}, {}, **fields)


def peft_finds(tied: bool, names: list[str]) -> set[str] | None:
    """The paths that PEFT wraps; None if any is neither a norm nor of the tokens."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    shape = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 64, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(
        **shape, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
        peft_config = peft.LoraConfig(target_modules=["o_proj"], modules_to_save=names)
        model = peft.get_peft_model(model, peft_config)
    wrapper = peft.utils.other.ModulesToSaveWrapper
    found = {
        path.removeprefix("base_model.model.")
        for path, module in model.named_modules()
        if isinstance(module, wrapper)
    }
    known = {*norm_paths(CONFIG), *TOKEN_PATHS.values()}
    return found if found <= known else None


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "names",
    [
        ["norm"],
        ["input_layernorm"],
        ["model.norm", "lm_head"],
        ["embed_tokens", "lm_head"],
        ["layers.0.input_layernorm"],
        ["head"],
        ["tokens", "score"],
        ["classifier"],
        ["q_proj"],
        ["1.mlp"],
        ["mlp"],
    ],
)
def test_modules_to_save_are_pefts(names: list[str], tied: bool) -> None:
    wanted = peft_finds(tied, names)
    ours = spec(saved=tuple(names))
    if wanted is None:
        with pytest.raises(AdapterInvalid, match=f"modules_to_save='{names[0]}' names model.*LoRA"):
            find_trained(ours, CONFIG)
        return
    found = find_trained(ours, TIED if tied else CONFIG)
    assert {*found.norms, *(TOKEN_PATHS[site] for site in found.weights)} == wanted
    paths = norm_paths(CONFIG)
    assert all(paths[i] == path for path, i in found.norms.items())


def test_a_tied_base_has_its_weights_twice() -> None:
    one = spec(saved=("embed_tokens",))
    assert find_trained(replace(one, tying=True), CONFIG).weights == {"embed"}
    tied = find_trained(replace(one, tying=True), TIED)
    assert tied.weights == {"embed", "lm_head"}
    assert tied.lacking({"embed"}) == set()  # one of the two is enough
    assert tied.lacking(()) == {"embed", "lm_head"}
    assert tied.sources({"lm_head"}) == {"embed": "lm_head", "lm_head": "lm_head"}
    apart = find_trained(one, TIED)
    assert apart.lacking(()) == {"embed"}
    assert apart.sources({"embed"}) == {"embed": "embed"}
    # What is saved without being trained is the base's own weight, which the two share.
    assert find_trained(spec(), TIED).sources({"embed"}) == {"embed": "embed", "lm_head": "embed"}
    assert find_trained(spec(), CONFIG).sources({"embed"}) == {"embed": "embed"}


def test_rows_of_a_tied_base_are_the_heads_too() -> None:
    rows = spec(token_ids={"embed_tokens": (3, 5)})
    assert find_trained(rows, CONFIG).row_sources() == {"embed": "embed"}
    assert find_trained(rows, TIED).row_sources() == {"embed": "embed", "lm_head": "embed"}
    both = spec(token_ids={"embed_tokens": (3, 5), "lm_head": (5,)})
    assert find_trained(both, TIED).row_sources() == {"embed": "embed", "lm_head": "lm_head"}
    same = spec(token_ids={"embed_tokens": (3, 5), "lm_head": (3, 5)})
    assert find_trained(same, TIED).token_ids == {"embed": (3, 5)}  # PEFT saves one
    assert find_trained(same, CONFIG).token_ids == {"embed": (3, 5), "lm_head": (3, 5)}


@pytest.mark.parametrize(
    ("fields", "config", "words"),
    [
        ({"token_ids": {"embed_tokens": (64,)}}, CONFIG, r"has 64, which is not .* \(0..63\)"),
        ({"token_ids": {"score": (1,)}}, CONFIG, "names 'score'; embed_tokens and lm_head have"),
        (
            {"token_ids": {"lm_head": (1,)}, "saved": ("lm_head",)},
            CONFIG,
            "lm_head is refused in modules_to_save and trainable_token_indices at once",
        ),
        (
            {"token_ids": {"embed_tokens": (1,)}, "saved": ("lm_head",)},
            TIED,
            "are refused for one tied weight",
        ),
    ],
)
def test_what_peft_does_not_have_is_refused(
    fields: dict[str, Any], config: Any, words: str
) -> None:
    with pytest.raises(AdapterInvalid, match=words):
        find_trained(spec(**fields), config)


def test_biases_are_those_of_linears_that_have_one() -> None:
    biased = replace(CONFIG, attention_bias=True)
    path = "model.layers.0.self_attn.q_proj"
    assert trained_biases(spec(), {path}, biased) == {}
    only = trained_biases(spec(bias="lora_only"), {path}, biased)
    assert only == {f"{path}.bias": (("qkv", 0, 0), 32)}
    assert len(trained_biases(spec(bias="all"), {path}, biased)) == 2 * 4
    assert trained_biases(spec(bias="all"), {path}, CONFIG) == {}
