"""The sampling defaults that a model's own generation_config.json names, as vLLM reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..config.model import read_json
from ..errors import CheckpointError, RequestError
from ..sampling_params import SamplingParams

NAMES = {
    "repetition_penalty": "repetition_penalty",
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "max_new_tokens": "max_tokens",
}
"""The file's names and ours. `do_sample` is not among them, as in vLLM."""


def sampling_defaults(folder: str | Path) -> dict[str, Any]:
    """Fields of SamplingParams; none without a file. A CheckpointError for values out of range."""
    path = Path(folder) / "generation_config.json"
    if not path.is_file():
        return {}
    raw = read_json(path)
    found = {ours: raw[name] for name, ours in NAMES.items() if raw.get(name) is not None}
    try:
        SamplingParams(**found)
    except RequestError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return found
