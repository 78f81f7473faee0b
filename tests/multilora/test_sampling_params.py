"""What SamplingParams takes, as vLLM's users write it, and what it refuses."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from multilora.errors import RequestError, shown
from multilora.sampling_params import (
    MAX_BIASED,
    MAX_STOP_CHARS,
    MAX_STOPS,
    REFUSED,
    RequestOutputKind,
    SamplingParams,
)


@pytest.mark.parametrize(
    ("given_as", "kept_as"),
    [
        ({"stop": None}, ()),
        ({"stop": "x"}, ("x",)),
        ({"stop": ["x", "y"]}, ("x", "y")),
        ({"stop_token_ids": None}, ()),
        ({"stop_token_ids": np.array([3, 4])}, (3, 4)),
        ({"allowed_token_ids": None}, None),
        ({"allowed_token_ids": [5, 6, 5]}, (5, 6)),
        ({"bad_words": None}, ()),
        ({"bad_words": ["no"]}, ("no",)),
        ({"logit_bias": {"7": 1, 8: np.float32(-2)}}, {7: 1.0, 8: -2.0}),
        ({"top_k": np.int64(4)}, 4),
        ({"temperature": np.float32(0.5)}, 0.5),
        ({"seed": np.uint8(3)}, 3),
        ({"seed": -1}, None),
        ({"seed": np.int64(-1)}, None),
        ({"logprobs": True}, 1),
        ({"prompt_logprobs": np.True_}, 1),
        ({"logprobs": -1}, -1),
        ({"ignore_eos": np.True_}, True),
        ({"output_kind": RequestOutputKind.DELTA}, RequestOutputKind.DELTA),
    ],
    ids=str,
)
def test_what_is_accepted(given_as: dict[str, Any], kept_as: Any) -> None:
    (name,) = given_as
    kept = getattr(SamplingParams(**given_as), name)
    assert (kept, type(kept)) == (kept_as, type(kept_as))


@pytest.mark.parametrize(
    "wrong",
    [
        {"n": 0}, {"n": 129}, {"n": True}, {"n": 1.0}, {"n": None}, {"top_k": -2}, {"top_p": 0},
        {"top_p": 1.1}, {"min_p": -0.1}, {"temperature": -1}, {"temperature": float("nan")},
        {"temperature": "1"}, {"temperature": 10**400}, {"repetition_penalty": 0},
        {"presence_penalty": 3}, {"max_tokens": 0}, {"min_tokens": 3, "max_tokens": 2},
        {"logprobs": -2}, {"seed": 2**63}, {"seed": 10**5000}, {"stop": 5}, {"stop": [""]},
        {"stop": ["x"] * 17}, {"stop": "x" * 1025}, {"stop": "x", "detokenize": False},
        {"stop": b"x"}, {"stop_token_ids": 5}, {"stop_token_ids": [-1]},
        {"stop_token_ids": ["1"]}, {"stop_token_ids": [10**5000]}, {"allowed_token_ids": []},
        {"allowed_token_ids": {5: 1}}, {"allowed_token_ids": [5] * 2_000_000},
        {"logit_bias": [5]}, {"logit_bias": {5: 101}}, {"logit_bias": {-1: 1}},
        {"logit_bias": {"a": 1}}, {"logit_bias": {"9" * 5000: 1}}, {"logit_bias": {10**5000: 1}},
        {"logit_bias": dict.fromkeys(range(1025), 1)}, {"bad_words": [" "]}, {"bad_words": [1]},
        {"bad_words": ["x" * 257]}, {"logits_processors": [1]}, {"detokenize": 1},
        {"output_kind": "delta"}, {"stream_interval": 0},
    ],
    ids=lambda wrong: shown(wrong),
)  # fmt: skip
def test_what_is_refused_is_said_in_a_line(wrong: dict[str, Any]) -> None:
    with pytest.raises(RequestError) as error:
        SamplingParams(**wrong)
    assert any(name in str(error.value) for name in wrong)
    assert len(str(error.value)) < 400


def test_a_name_that_is_none_names_those_that_are() -> None:
    with pytest.raises(RequestError, match=r"unknown .*'max_token'; known: n, temperature"):
        SamplingParams(max_token=3)  # type: ignore[call-arg]
    with pytest.raises(RequestError, match="by name"):
        SamplingParams(1)  # type: ignore[call-arg,misc]


@pytest.mark.parametrize("name", REFUSED)
def test_what_vllm_has_and_we_have_not(name: str) -> None:
    """Asking for nothing is fine; for more, the error says what to do."""
    inert, why = REFUSED[name]
    for value in inert:
        assert SamplingParams(**{name: value}) == SamplingParams()
    with pytest.raises(RequestError) as error:
        SamplingParams(**{name: {"json": "{}"}})
    assert why in str(error.value)


def test_a_mapping_that_changes_later_changes_nothing() -> None:
    bias = {3: 1.0}
    params = SamplingParams(logit_bias=bias)
    bias[4] = 2.0
    assert params.logit_bias == {3: 1.0}


def test_clones_and_copies_are_equal() -> None:
    params = SamplingParams(stop=["x"], logit_bias={1: 2}, bad_words=["no"], seed=3)
    for other in (params.clone(), copy.deepcopy(params), pickle.loads(pickle.dumps(params))):
        assert other == params
    assert params.clone(temperature=0).temperature == 0
    with pytest.raises(RequestError, match="top_p"):
        params.clone(top_p=2)


ANY: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.binary()
    | st.just(10**400) | st.just("x" * 100_000),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.integers() | st.text(), inner),
    max_leaves=8,
)  # fmt: skip
FIELDS = [*SamplingParams.__dataclass_fields__, *REFUSED, "unknown"]


@given(st.dictionaries(st.sampled_from(FIELDS), ANY, max_size=3))
def test_any_value_of_any_field_is_taken_or_refused(fields: dict[str, Any]) -> None:
    with suppress(RequestError):
        SamplingParams(**fields)


# Of each number the least and the largest that are taken, then what is beyond.
RANGES: dict[str, tuple[Any, Any, list[Any]]] = {
    "n": (1, 128, [0, 129, 1.0, True, "1", None]),
    "top_k": (-1, 10**9, [-2, 1.5, None]),
    "min_tokens": (0, 16, [-1, 17, None]),
    "max_tokens": (1, None, [0, 2.0, False]),
    "logprobs": (-1, 20, [-2, 1.0, False]),
    "prompt_logprobs": (-1, 20, [-2, 1.0, False]),
    "seed": (-(2**63), 2**63 - 1, [-(2**63) - 1, 2**63, 0.0]),
    "temperature": (0, 100, [-0.1, 100.1, math.nan, math.inf, True, "1", None]),
    "top_p": (1e-9, 1, [0, -0.1, 1.1, math.nan]),
    "min_p": (0, 1, [-0.1, 1.1, math.nan]),
    "repetition_penalty": (1e-9, 100, [0, -1, 101, math.inf]),
    "presence_penalty": (-2, 2, [-2.1, 2.1, math.nan]),
    "frequency_penalty": (-2, 2, [-2.1, 2.1, math.nan]),
}


@pytest.mark.parametrize("name", RANGES)
def test_a_number_beyond_its_range_is_named(name: str) -> None:
    least, largest, wrong = RANGES[name]
    for value in (least, largest):
        assert getattr(SamplingParams(**{name: value}), name) == value
    for value in wrong:
        with pytest.raises(RequestError, match=name):
            SamplingParams(**{name: value})


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens 5 is above max_tokens 4"),
        ({"stop": ""}, "non-empty strings"),
        ({"stop": [3]}, "non-empty strings"),
        ({"stop": ["x"] * (MAX_STOPS + 1)}, f"at most {MAX_STOPS}"),
        ({"stop": "x" * (MAX_STOP_CHARS + 1)}, f"at most {MAX_STOP_CHARS} characters"),
        ({"stop": "x", "detokenize": False}, "use stop_token_ids instead"),
        ({"stop_token_ids": [-1]}, "stop_token_ids must be token ids"),
        ({"stop_token_ids": [True]}, "stop_token_ids must be token ids"),
        ({"allowed_token_ids": [1.0]}, "allowed_token_ids must be token ids"),
        ({"allowed_token_ids": []}, "give None for all"),
        ({"logit_bias": dict.fromkeys(range(MAX_BIASED + 1), 1.0)}, f"at most {MAX_BIASED}"),
        ({"logit_bias": {3: 100.5}}, r"ids map to -100\.\.100"),
        ({"logit_bias": {3: math.nan}}, r"ids map to -100\.\.100"),
        ({"logit_bias": {-3: 1.0}}, r"ids map to -100\.\.100"),
    ],
)
def test_what_does_not_go_together_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        SamplingParams(**fields)


def test_the_largest_that_is_taken() -> None:
    SamplingParams(
        stop=["x" * MAX_STOP_CHARS] * MAX_STOPS,
        logit_bias=dict.fromkeys(range(MAX_BIASED), -100.0),
        min_tokens=16,
        max_tokens=16,
    )


def test_they_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SamplingParams().n = 2  # type: ignore[misc]
