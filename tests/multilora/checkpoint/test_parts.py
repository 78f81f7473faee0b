"""What a model asks of a checkpoint, part by part."""

from __future__ import annotations

import torch

from multilora.checkpoint.parts import fill, is_ignored, some_of


def test_a_part_fills_its_targets_in_their_dtype() -> None:
    targets = {"x": torch.zeros(2, 3, dtype=torch.bfloat16), "y": torch.zeros(4)}
    stored = {"x": torch.rand(2, 3), "y": torch.rand(4, dtype=torch.float64)}
    part = fill(targets)
    assert part.shapes == {"x": (2, 3), "y": (4,)}
    part.load(stored.__getitem__)
    assert torch.equal(targets["x"], stored["x"].bfloat16())
    assert torch.equal(targets["y"], stored["y"].float())


def test_long_lists_are_cut() -> None:
    assert some_of(["a", "b"]) == "a, b"
    assert some_of(list("abcde")) == "a, b, c, d, e"
    assert some_of(list("abcdefg")) == "a, b, c, d, e and 2 more"


def test_rotary_tables_alone_are_ignored() -> None:
    assert is_ignored("model.layers.0.self_attn.rotary_emb.inv_freq")
    assert is_ignored("rope.freqs")
    assert not is_ignored("model.layers.0.self_attn.q_proj.weight")
