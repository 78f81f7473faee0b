"""What a request slot knows of its tokens, and forgets."""

from __future__ import annotations

from typing import Any

import numpy as np

from multilora.runtime.step_inputs import lay_out
from multilora.sampling.sampler import SampledToken
from multilora.scheduling.scheduler_output import ScheduledChunk, SchedulerOutput
from tests.harness.request_slots import FakeStore, new_sequence, new_slots


def test_a_sampled_token_is_known_from_then_on() -> None:
    slots = new_slots()
    first = ScheduledChunk(3, 0, 2, -1, (9,), True)
    slots.take(SchedulerOutput((new_sequence(3, [5, 6], 2),), (first,), ()))
    rows = slots.sampling_rows(np.array([3]), np.array([2]))
    chunk = ScheduledChunk(3, 2, 1, -1, (9,), True)
    store: Any = FakeStore()
    ahead = lay_out((chunk,), slots, store, 1).tensors
    assert (ahead.token_ids.tolist(), ahead.token_request_slots.tolist()) == ([0], [3])
    slots.append(rows, [SampledToken(77, None, None)])
    later = lay_out((chunk,), slots, store, 1).tensors
    assert (later.token_ids.tolist(), later.token_request_slots.tolist()) == ([77], [-1])
    assert slots.sampling_rows(np.array([3]), np.array([3])).positions.tolist() == [1]


def test_a_token_that_could_not_be_sampled_is_not_taken_in() -> None:
    slots = new_slots()
    first = ScheduledChunk(3, 0, 2, -1, (9,), True)
    slots.take(SchedulerOutput((new_sequence(3, [5, 6], 2),), (first,), ()))
    rows = slots.sampling_rows(np.array([3]), np.array([2]))
    slots.append(rows, [SampledToken(None, None, "broken")])
    ids, is_known = slots.tokens(np.array([3]), np.array([2]))
    assert (ids.tolist(), is_known.tolist()) == ([0], [False])


def test_a_request_slot_forgets_who_had_it() -> None:
    slots = new_slots()
    old = ScheduledChunk(0, 0, 9, -1, (1, 2, 3), True)
    slots.take(SchedulerOutput((new_sequence(0, [8] * 9, 9, prompt_logprobs=1),), (old,), ()))
    new = ScheduledChunk(0, 0, 5, -1, (7, 8), True)
    slots.take(SchedulerOutput((new_sequence(0, [4] * 5, 5),), (new,), freed_request_slots=(0,)))
    step = lay_out((new,), slots, FakeStore(), 1)  # type: ignore[arg-type]
    assert step.tensors.token_ids.tolist() == [4] * 5
    assert step.tensors.kv_slots.tolist() == [28, 29, 30, 31, 32]
    assert list(step.num_scored) == [0]
    ids, is_known = slots.tokens(np.array([0]), np.array([6]))
    assert (ids.tolist(), is_known.tolist()) == ([0], [False])


def test_prompt_logprobs_score_all_but_the_first_token_of_a_prompt() -> None:
    slots = new_slots()
    scored = new_sequence(0, [8] * 9, 9, prompt_logprobs=0)
    with_output = new_sequence(1, [8] * 9, 7, prompt_logprobs=2)
    slots.take(SchedulerOutput((scored, with_output, new_sequence(2, [8] * 9, 9)), (), ()))
    assert slots.num_scored(np.array([0, 1, 2])).tolist() == [8, 6, 0]


def test_a_slot_is_known_from_its_first_step_until_it_is_freed() -> None:
    slots = new_slots()
    slots.take(SchedulerOutput((new_sequence(0, [8], 1), new_sequence(3, [8], 1)), (), ()))
    assert slots.known == {0, 3}
    slots.take(SchedulerOutput((new_sequence(1, [8], 1),), (), freed_request_slots=(3,)))
    assert slots.known == {0, 1}
    slots.reset()
    assert slots.known == set()
