"""Empty request slots, sequences to fill them, and a store of adapters that knows sizes alone."""

from __future__ import annotations

from typing import Any

import torch

from multilora.runtime.request_slots import RequestSlots
from multilora.sampling_params import SamplingParams
from multilora.scheduling.scheduler_output import NewSequence

SLOTS, LENGTH, SIZE, VOCAB = 12, 64, 4, 500


class FakeStore:
    """Slot 1 adapts the head as well; the base adapts nothing."""

    needs_token_slots = True

    def active_sites(self, slots: Any) -> frozenset[str]:
        sites = {"qkv"} if max(slots) >= 0 else set()
        return frozenset(sites | ({"lm_head"} if 1 in slots else set()))

    def most_pages(self, slots: Any) -> int:
        return 1


def new_slots() -> RequestSlots:
    return RequestSlots(SLOTS, LENGTH, SIZE, VOCAB, torch.device("cpu"))


def new_sequence(slot: int, ids: list[int], num_prompt: int, **fields: Any) -> NewSequence:
    return NewSequence(slot, ids, num_prompt, SamplingParams(**fields), slot, frozenset())
