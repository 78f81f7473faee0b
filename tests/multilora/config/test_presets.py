"""Published shapes: as many weights as published, with fewer layers if asked."""

from __future__ import annotations

import pytest

from multilora.config.lora_sites import sites_of
from multilora.config.presets import SHAPES, shape_of
from multilora.errors import CheckpointError


def weights(name: str) -> int:
    config = SHAPES[name]
    linears = sum(site.layers * site.in_ * site.out for site in sites_of(config).values())
    norms = (2 * config.num_layers + 1) * config.hidden_size
    head = config.vocab_size * config.hidden_size if config.tie_word_embeddings else 0
    return linears + norms - head


def test_the_shapes_have_as_many_weights_as_published() -> None:
    assert weights("llama-3.1-8b") == 8_030_261_248
    assert weights("llama-3.1-70b") == 70_553_706_496
    assert weights("llama-3.2-1b") == 1_235_814_400


def test_a_shape_can_have_fewer_layers() -> None:
    assert shape_of("llama-3.1-70b:2").num_layers == 2
    assert shape_of("llama-3.1-70b").num_layers == 80
    for wrong in ("llama-3.1-70b:", "llama-3.1-70b:x", "llama-3.1-70b:0", "llama-9"):
        with pytest.raises(CheckpointError, match=repr(wrong)):
            shape_of(wrong)
