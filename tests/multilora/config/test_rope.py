"""What a config.json may say of its rotary embedding; the arithmetic is tested in model/."""

from __future__ import annotations

from typing import Any

import pytest

from multilora.config.rope import RopeScaling, read_rope_scaling
from multilora.errors import CheckpointError


def test_kinds() -> None:
    assert read_rope_scaling({}, 4096) is None
    assert read_rope_scaling({"rope_type": "dynamic", "factor": 2.0}, 4096) is None
    linear = read_rope_scaling({"type": "linear", "factor": 2.0}, 4096)
    assert linear == RopeScaling(rope_type="linear", factor=2.0)
    yarn = read_rope_scaling({"rope_type": "yarn", "original_max_position_embeddings": 1024}, 4096)
    assert yarn is not None
    assert (yarn.factor, yarn.attention_factor) == (4.0, pytest.approx(1.1386294))


@pytest.mark.parametrize(
    ("rope", "words"),
    [
        ({"rope_type": "longrope"}, "'longrope' is not supported; supported: default, linear"),
        ({"rope_type": "linear"}, "factor is missing"),
        ({"rope_type": "linear", "factor": 10**400}, "factor must be a positive number"),
        ({"rope_type": "yarn", "original_max_position_embeddings": 0}, "positive integer"),
        ({"rope_type": "yarn", "beta_fast": -1}, "beta_fast must be a positive number"),
        (
            {
                "rope_type": "llama3",
                "factor": 8,
                "low_freq_factor": 4,
                "high_freq_factor": 4,
                "original_max_position_embeddings": 8192,
            },
            "low_freq_factor 4.0 must be below",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
def test_what_is_refused(rope: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        read_rope_scaling(rope, 4096)
