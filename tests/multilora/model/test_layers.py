"""The parts of a Llama beside its linears."""

from __future__ import annotations

import pytest
import torch

from multilora.model.layers import Rope
from tests.harness.model_folders import TINY


class Interrupted(BaseException):
    """What Ctrl-C is."""


def test_rotary_tables_grow_together_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    rope = Rope(TINY)

    def interrupted(_: torch.Tensor) -> None:
        raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "sin", interrupted)
        with pytest.raises(Interrupted):
            rope.tables(10)
    cos, sin = rope.tables(10)
    assert cos.shape == sin.shape == (Rope.STEP, TINY.head_dim // 2)
