"""Sampling defaults of a model's own file; transformers' names, vLLM's choice of them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from multilora.checkpoint.generation_config import sampling_defaults
from multilora.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path


def test_what_a_real_file_holds(tmp_path: Path) -> None:
    """Llama 3.1's, and two names that only some models write."""
    assert sampling_defaults(tmp_path) == {}
    raw = {"bos_token_id": 128000, "do_sample": True, "eos_token_id": [128001, 128009],
           "temperature": 0.6, "top_p": 0.9, "max_new_tokens": 64, "top_k": None}  # fmt: skip
    (tmp_path / "generation_config.json").write_text(json.dumps(raw))
    assert sampling_defaults(tmp_path) == {"temperature": 0.6, "top_p": 0.9, "max_tokens": 64}


@pytest.mark.parametrize("text", ['{"temperature": -1}', '{"top_p": "x"}', "[]", "{"])
def test_a_wrong_file_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        sampling_defaults(tmp_path)
