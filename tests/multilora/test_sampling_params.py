"""Sampling parameters: what is taken as it is, and what is refused, by name."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from multilora.errors import RequestError
from multilora.sampling_params import MAX_BIASED, MAX_STOP_CHARS, MAX_STOPS, SamplingParams


def test_one_stop_string_is_a_tuple_of_one() -> None:
    assert SamplingParams(stop="END").stop == ("END",)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")
    assert SamplingParams().stop == ()


# Of each number the least and the largest that are taken, then what is beyond.
RANGES: dict[str, tuple[Any, Any, list[Any]]] = {
    "n": (1, 128, [0, 129, 1.0, True, "1", None]),
    "top_k": (-1, 10**9, [-2, 1.5, None]),
    "min_tokens": (0, 16, [-1, 17, None]),
    "max_tokens": (1, None, [0, 2.0, False]),
    "logprobs": (0, 20, [-1, 21, True]),
    "prompt_logprobs": (0, 20, [-1, 21, True]),
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
        ({"logit_bias": {"3": 1.0}}, r"ids map to -100\.\.100"),
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


def test_an_unknown_name_lists_the_known_ones() -> None:
    assert SamplingParams.from_kwargs(top_k=3) == SamplingParams(top_k=3)
    with pytest.raises(RequestError, match=r"'best_of'; known: n, temperature, .*detokenize"):
        SamplingParams.from_kwargs(best_of=2)


def test_they_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SamplingParams().n = 2  # type: ignore[misc]
