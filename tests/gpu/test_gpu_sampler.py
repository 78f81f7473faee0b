"""The sampler on the device samples what the CPU's samples, over all sampling parameters."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest
import torch

from tests.harness.sampler_calls import VOCAB, random_request, sample, sample_on_device

if TYPE_CHECKING:
    from multilora.device.cpu import Device

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("kinds", [None, 30], ids=["distinct", "many equal"])
def test_it_samples_the_tokens_of_the_cpu(device: Device, kinds: int | None) -> None:
    draw, parted = random.Random(7), 0
    for _ in range(12):
        requests = [random_request(draw) for _ in range(32)]
        logits = torch.randn(32, VOCAB) * 3
        if kinds is not None:
            logits = torch.randint(0, kinds, (32, VOCAB)) / 8
        ours = sample_on_device(device, logits.to(device.torch), requests)
        theirs = sample(logits, requests)
        parted += sum(
            (a.token, a.error) != (b.token, b.error) for a, b in zip(ours, theirs, strict=True)
        )
    # A GPU's exp and quotients may differ in the last bit, and so a token at the edge of a draw.
    assert parted <= 2
