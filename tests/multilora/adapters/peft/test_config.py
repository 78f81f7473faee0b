"""`adapter_config.json`: each field of the installed PEFT has a decision, each bad value a text."""

from __future__ import annotations

import dataclasses
import json
import time
from typing import Any

import pytest

from multilora.adapters.peft.config import (
    HARMLESS,
    HONOURED,
    LLAMA_TARGETS,
    REFUSED,
    LoraSpec,
    parse_config,
)
from multilora.errors import AdapterInvalid

GOOD: dict[str, Any] = {
    "peft_type": "LORA",
    "r": 8,
    "lora_alpha": 16,
    "target_modules": ["q_proj", "v_proj"],
}


def parse(**fields: Any) -> LoraSpec:
    return parse_config(json.dumps({**GOOD, **fields}).encode())


def assert_refused(data: bytes, fragment: str) -> None:
    start = time.thread_time()
    with pytest.raises(AdapterInvalid) as caught:
        parse_config(data)
    assert time.thread_time() - start < 0.2
    assert fragment in str(caught.value)
    assert len(str(caught.value)) < 600


# ---- a decision for every field -----------------------------------------------------------------


def test_every_field_of_the_installed_peft_has_one_decision() -> None:
    peft = pytest.importorskip("peft")
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    decided = [*HONOURED, *HARMLESS, *REFUSED]
    assert fields - set(decided) == set()
    assert len(decided) == len(set(decided))


def test_every_decision_gives_its_reason() -> None:
    assert all(HONOURED.values())
    assert all(HARMLESS.values())
    assert all(refusal.cure for refusal in REFUSED.values())


def test_the_defaults_of_the_installed_peft_are_accepted() -> None:
    peft = pytest.importorskip("peft")
    raw = {k: v for k, v in peft.LoraConfig().to_dict().items() if k != "runtime_config"}
    spec = parse_config(json.dumps(raw, default=list).encode())
    assert spec == LoraSpec(8, 8.0, False, frozenset(LLAMA_TARGETS), frozenset(), None, (), {}, {})


def test_dora_and_biases_are_read() -> None:
    fields = {"use_dora": True, "lora_bias": False, "bias": "lora_only"}
    spec = parse_config(json.dumps({**GOOD, **fields}).encode())
    assert (spec.dora, spec.lora_bias, spec.bias) == (True, False, "lora_only")
    assert parse_config(json.dumps({**GOOD, "bias": None}).encode()).bias == "none"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"use_dora": 1}, "use_dora"),
        ({"use_dora": "yes"}, "use_dora"),
        ({"lora_bias": []}, "lora_bias"),
        ({"bias": True}, "bias must be none, all, lora_only, not True"),
        ({"bias": "some"}, "bias must be none, all, lora_only, not 'some'"),
        ({"use_dora": True, "lora_bias": True}, "use_dora with lora_bias is refused"),
    ],
)
def test_dora_and_biases_of_other_values_are_refused(fields: dict[str, Any], words: str) -> None:
    assert_refused(json.dumps({**GOOD, **fields}).encode(), words)


REFUSED_VALUES: dict[str, list[Any]] = {
    "layer_replication": [[[0, 2], [1, 2]]],
    "target_parameters": [["mlp.experts.gate_up_proj"]],
    "fan_in_fan_out": [True],
    "init_lora_weights": [
        "pissa",
        "pissa_niter_4",
        "olora",
        "corda",
        "loftq",
        "lora_ga",
        "PiSSA",
        0,
    ],
    "megatron_config": [{"tp": 2}],
    "use_qalora": [True],
    "monteclora_config": [{}],
    "use_bdlora": [{}],
    "arrow_config": [{"top_k": 3}],
    "kasa_config": [{"beta": 1e-4}],
}


def test_every_refused_field_has_a_refused_value_here() -> None:
    assert REFUSED_VALUES.keys() == REFUSED.keys()


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_by_name_with_a_cure(name: str) -> None:
    for value in REFUSED_VALUES[name]:
        data = json.dumps({**GOOD, "target_modules": ["lm_head"], name: value}).encode()
        assert_refused(data, f"{name}={value!r} is refused: {REFUSED[name].cure[:40]}")


@pytest.mark.parametrize("name", REFUSED)
def test_accepts_a_refused_field_where_it_changes_nothing(name: str) -> None:
    for value in (None, *REFUSED[name].neutral):
        assert parse(**{name: value}) == parse()


def test_an_invocation_is_read() -> None:
    assert parse(alora_invocation_tokens=[5, 0]).invocation == (5, 0)
    assert parse(alora_invocation_tokens=[]) == parse(alora_invocation_tokens=None) == parse()


def test_alpha_may_be_negative() -> None:
    assert parse(lora_alpha=-4).alpha == -4.0


def test_the_refusal_of_pissa_says_how_to_convert() -> None:
    with pytest.raises(AdapterInvalid, match="path_initial_model_for_weight_conversion"):
        parse(init_lora_weights="pissa")


def test_what_is_trained_beside_lora_is_read() -> None:
    assert parse(modules_to_save=["norm", "lm_head"]).saved == ("norm", "lm_head")
    assert parse(trainable_token_indices=[5, 0]).token_ids == {"embed_tokens": (5, 0)}
    both = {"embed_tokens": [1], "lm_head": [2, 3], "score": []}
    assert parse(trainable_token_indices=both).token_ids == {
        "embed_tokens": (1,),
        "lm_head": (2, 3),
    }
    assert parse(ensure_weight_tying=True).tying
    for nothing in ({"modules_to_save": []}, {"trainable_token_indices": []}):
        assert parse(**nothing) == parse()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"modules_to_save": "lm_head"}, "must be a list of names, not 'lm_head'"),
        ({"modules_to_save": ["norm", 3]}, "must be a list of names"),
        ({"modules_to_save": [""]}, "must be a list of names"),
        ({"modules_to_save": ["a"] * 513}, "has 513 names, more than 512"),
        ({"trainable_token_indices": 3}, "must be a list of token ids"),
        ({"trainable_token_indices": [True]}, "must be a list of token ids"),
        ({"trainable_token_indices": [-1]}, "must be a list of token ids"),
        ({"trainable_token_indices": {"lm_head": 3}}, "must be a list of token ids"),
        ({"trainable_token_indices": [3, 4, 3]}, "names a token twice"),
        ({"ensure_weight_tying": 1}, "ensure_weight_tying must be true or false"),
        ({"alora_invocation_tokens": [1], "modules_to_save": ["norm"]}, "with modules_to_save"),
        ({"alora_invocation_tokens": [1], "trainable_token_indices": [1]}, "with trainable_token"),
    ],
)
def test_what_is_trained_beside_lora_has_its_types(fields: dict[str, Any], words: str) -> None:
    assert_refused(json.dumps({**GOOD, **fields}).encode(), words)


def test_an_adapter_of_mlx_is_called_by_its_name() -> None:
    data = json.dumps({"fine_tune_type": "lora", "lora_parameters": {"rank": 8}}).encode()
    with pytest.raises(AdapterInvalid, match=r"MLX-LM.*convert"):
        parse_config(data)


def test_more_names_than_any_base_has() -> None:
    many = [f"m{i}" for i in range(60_000)]
    for name, value in (("target_modules", many), ("rank_pattern", dict.fromkeys(many, 8))):
        with pytest.raises(AdapterInvalid, match=f"{name} names 60000 modules"):
            parse(**{name: value})


def test_harmless_fields_change_nothing() -> None:
    assert parse(**dict.fromkeys(HARMLESS, "anything")) == parse()


@pytest.mark.parametrize("value", [None, False, "", [], {}])
def test_accepts_an_unknown_field_that_is_switched_off(value: Any) -> None:
    assert parse(quantum_lora=value) == parse()


@pytest.mark.parametrize("value", [True, 0, 1, 0.5, "x", [0], {"a": None}])
def test_refuses_an_unknown_field_by_name(value: Any) -> None:
    assert_refused(json.dumps({**GOOD, "quantum_lora": value}).encode(), "'quantum_lora'=")


# ---- honoured fields ----------------------------------------------------------------------------


def test_reads_the_honoured_fields() -> None:
    spec = parse(
        use_rslora=True,
        lora_alpha=2.5,
        exclude_modules="x.*",
        layers_to_transform=[3, 1],
        layers_pattern="layers",
        rank_pattern={"a": 1},
        alpha_pattern={"b": 2},
    )
    assert spec == LoraSpec(
        rank=8,
        alpha=2.5,
        rslora=True,
        targets=frozenset({"q_proj", "v_proj"}),
        exclude="x.*",
        layers=frozenset({1, 3}),
        layers_patterns=("layers",),
        rank_pattern={"a": 1},
        alpha_pattern={"b": 2.0},
    )


def test_takes_one_layer_or_an_empty_list_as_peft_does() -> None:
    assert parse(layers_to_transform=0).layers == {0}
    assert parse(layers_to_transform=[]).layers is None


def test_keeps_the_order_of_the_patterns() -> None:
    assert list(parse(rank_pattern={"b": 1, "a": 2}).rank_pattern) == ["b", "a"]


BAD_VALUES: dict[str, tuple[dict[str, Any], str]] = {
    "another method": ({"peft_type": "IA3"}, "peft_type='IA3' is refused"),
    "no method": ({"peft_type": None}, "peft_type=None is refused"),
    "r missing": ({"r": None}, "r must be a positive integer, not None"),
    "r zero": ({"r": 0}, "r must be a positive integer, not 0"),
    "r negative": ({"r": -8}, "r must be a positive integer, not -8"),
    "r bool": ({"r": True}, "r must be a positive integer, not True"),
    "r float": ({"r": 8.0}, "r must be a positive integer, not 8.0"),
    "r string": ({"r": "8"}, "r must be a positive integer, not '8'"),
    "alpha missing": ({"lora_alpha": None}, "lora_alpha must be a finite number"),
    "alpha NaN": ({"lora_alpha": float("nan")}, "lora_alpha must be a finite number"),
    "alpha infinite": ({"lora_alpha": float("inf")}, "lora_alpha must be a finite number"),
    "invocation of text": ({"alora_invocation_tokens": "hey"}, "must be a list of token ids"),
    "invocation bool": ({"alora_invocation_tokens": [True]}, "must be a list of token ids"),
    "invocation negative": ({"alora_invocation_tokens": [3, -1]}, "must be a list of token ids"),
    "invocation long": ({"alora_invocation_tokens": [1] * 513}, "has 513 tokens, more than 512"),
    "activated dora": (
        {"alora_invocation_tokens": [1], "use_dora": True},
        "alora_invocation_tokens is refused with use_dora",
    ),
    "activated biases": (
        {"alora_invocation_tokens": [1], "bias": "all"},
        "alora_invocation_tokens is refused with bias: all tokens have it",
    ),
    "alpha bool": ({"lora_alpha": True}, "not True"),
    "alpha beyond floats": ({"lora_alpha": 10**4000}, "lora_alpha must be a finite number"),
    "rslora": ({"use_rslora": "yes"}, "use_rslora must be true or false"),
    "target number": ({"target_modules": 3}, "target_modules must be a string or a list"),
    "target list": ({"target_modules": ["q_proj", 3]}, "target_modules must be a string or a list"),
    "exclude object": ({"exclude_modules": {"a": 1}}, "exclude_modules must be a string or a list"),
    "layer bool": ({"layers_to_transform": True}, "layers_to_transform must be an integer"),
    "layer string": ({"layers_to_transform": ["1"]}, "layers_to_transform must be an integer"),
    "layers of a regex": (
        {"target_modules": "all-linear", "layers_to_transform": [0]},
        "layers_to_transform needs a list in target_modules",
    ),
    "pattern without layers": ({"layers_pattern": ["h"]}, "layers_pattern has no meaning without"),
    "pattern number": (
        {"layers_pattern": [1], "layers_to_transform": 1},
        "layers_pattern must be a string",
    ),
    "rank pattern list": ({"rank_pattern": [1]}, "rank_pattern must be an object"),
    "rank pattern zero": (
        {"rank_pattern": {"q": 0}},
        "rank_pattern['q'] must be a positive integer",
    ),
    "alpha pattern": ({"alpha_pattern": {"q": None}}, "alpha_pattern['q'] must be a finite number"),
}


@pytest.mark.parametrize(("fields", "fragment"), BAD_VALUES.values(), ids=BAD_VALUES.keys())
def test_refuses_bad_values(fields: dict[str, Any], fragment: str) -> None:
    assert_refused(json.dumps({**GOOD, **fields}).encode(), fragment)


BAD_BYTES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is not JSON"),
    "text": (b"r: 8", "is not JSON"),
    "cut": (json.dumps(GOOD).encode()[:-1], "is not JSON"),
    "UTF-16": (json.dumps(GOOD).encode("utf-16"), "is not JSON"),
    "list": (b"[1]", "must hold a JSON object, not list"),
    "null": (b"null", "must hold a JSON object, not NoneType"),
    "deep": (b'{"a":' * 100_000, "more than 8192 lists and objects"),
    "less deep": (b'{"a":' * 8000, "is not JSON"),
    "digits": (b'{"r": ' + b"9" * 100_000 + b"}", "is not JSON"),
    "key twice": (b'{"peft_type": "LORA", "r": 8, "r": 16}', "has the key 'r' twice"),
    "inner key twice": (b'{"rank_pattern": {"q": 8, "q": 16}}', "has the key 'q' twice"),
}


@pytest.mark.parametrize(("data", "fragment"), BAD_BYTES.values(), ids=BAD_BYTES.keys())
def test_refuses_bytes_that_are_no_object(data: bytes, fragment: str) -> None:
    assert_refused(data, fragment)
