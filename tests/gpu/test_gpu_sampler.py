"""The sampler on the device chooses what the CPU's chooses, over all sampling parameters."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest
import torch

from multilora.device.input_buffer import InputBuffer
from multilora.sampling.device import Adjuster, Choice, choose, draw_fields
from multilora.sampling.host import sample
from tests.multilora.test_batch_sampler import VOCAB, random_row

if TYPE_CHECKING:
    from multilora.device.cpu import Device

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("kinds", [None, 30], ids=["distinct", "many equal"])
def test_it_chooses_the_tokens_of_the_cpu(device: Device, kinds: int | None) -> None:
    draw, parted = random.Random(7), 0
    for _ in range(12):
        rows = [random_row(draw) for _ in range(32)]
        logits = torch.randn(32, VOCAB) * 3
        if kinds is not None:
            logits = torch.randint(0, kinds, (32, VOCAB)) / 8
        choices = [
            Choice(row, Adjuster.of(row, VOCAB, device.torch), len(row.output_ids)) for row in rows
        ]
        sent = InputBuffer(device, 1 << 16).send(draw_fields(choices, VOCAB))
        tokens, failed = choose(logits.to(device.torch), choices, sent)
        ours = list(zip(tokens.tolist(), failed.tolist(), strict=True))
        theirs = [(s.token, s.failed) for s in sample(logits, rows)]
        parted += sum(a != b for a, b in zip(ours, theirs, strict=True))
    # A GPU's exp and quotients may differ in the last bit, and so a token at the edge of a draw.
    assert parted <= 2
