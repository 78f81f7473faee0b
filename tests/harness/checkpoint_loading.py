"""Checkpoints that are loaded whole, edited, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from multilora.checkpoint.parts import fill
from multilora.checkpoint.reader import load_checkpoint
from multilora.errors import CheckpointError
from tests.harness import model_folders as make

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from multilora.config.model import ModelConfig


def empty_targets(config: ModelConfig, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {
        name: torch.full(shape, float("nan"), dtype=dtype)
        for name, shape in make.weight_shapes(config).items()
    }


def loaded(folder: Path, config: ModelConfig, **kwargs: Any) -> dict[str, Tensor]:
    targets = empty_targets(config, **kwargs)
    load_checkpoint(folder, [fill(targets)], config)
    return targets


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name


def edit_weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def refused(folder: Path, config: ModelConfig) -> str:
    """The text of the error, after a check that no target was touched."""
    targets = empty_targets(config)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(folder, [fill(targets)], config)
    assert all(t.isnan().all() for t in targets.values())
    return str(caught.value)
