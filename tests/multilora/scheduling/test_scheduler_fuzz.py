"""Any order of requests, steps and aborts: every sequence ends and nothing leaks."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from multilora.outputs import FinishReason
from multilora.scheduling.sequence import Sequence
from tests.harness.scheduler_house import House

ACTION = st.one_of(
    st.tuples(
        st.just("add"),
        st.integers(1, 12),  # prompt length
        st.integers(4, 12),  # max_tokens
        st.sampled_from(["", "a", "b", "c"]),
        st.booleans(),  # prompt logprobs
        st.integers(0, 20),  # where its mix begins, if that lies in the prompt
    ),
    st.tuples(st.just("step"), st.integers(1, 5)),
    st.tuples(st.sampled_from(["abort", "abort in flight", "finish"]), st.integers(0, 9)),
    st.tuples(st.just("cold"), st.sampled_from(["a", "b", "c"])),
)


def act(house: House, seqs: list[Sequence], action: tuple[Any, ...]) -> None:
    """Does one of the actions to the house."""
    scheduler = house.scheduler
    if action[0] == "add":
        _, length, max_tokens, mix, scored, start = action
        prompt = [3 + i // 8 % 2 for i in range(length)]  # prompts often share a prefix
        logprobs = 0 if scored and length % 3 == 0 else None
        kwargs = {"max_tokens": max_tokens, "prompt_logprobs": logprobs}
        kwargs["adapter_start"] = start if mix and start < length else 0
        seqs.append(house.seq(prompt, mix=mix, max_total=length + max_tokens, **kwargs))
    elif action[0] == "step":
        for _ in range(action[1]):
            house.step(token=lambda seq: 3 + len(seq.output_ids) % 5)
    elif action[0] == "cold":
        house.slots.cold ^= {((action[1], 1.0),)}
    elif seqs:
        seq = seqs[action[1] % len(seqs)]
        plan = house.plan() if action[0] == "abort in flight" else None
        if action[0] == "finish":
            if seq.finish_reason is None:
                scheduler.finish(seq, FinishReason.STOP, "END")
        else:
            scheduler.abort(seq)
        house.check()
        if plan is not None:
            assert seq not in scheduler.update(plan, house.run(plan))
    house.check()


@settings(max_examples=120)
@given(
    actions=st.lists(ACTION, min_size=8, max_size=30),
    num_blocks=st.integers(6, 9),
    max_num_seqs=st.integers(1, 5),
    budget=st.integers(1, 16),
    num_slots=st.integers(1, 2),
    caching=st.booleans(),
)
def test_every_sequence_ends_and_nothing_leaks(
    actions: list[tuple[Any, ...]],
    num_blocks: int,
    max_num_seqs: int,
    budget: int,
    num_slots: int,
    caching: bool,
) -> None:
    house = House(
        num_blocks,
        num_slots,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        enable_prefix_caching=caching,
    )
    seqs: list[Sequence] = []
    for action in actions:
        act(house, seqs, action)
    house.slots.cold.clear()
    for _ in range(10_000):
        if house.step() is None:
            break
    house.check_empty()
    for seq in seqs:
        assert seq.finish_reason is not None
        if seq.finish_reason is FinishReason.LENGTH:
            assert len(seq.output_ids) == seq.params.max_tokens
        if not caching or seq.params.prompt_logprobs is not None:
            assert not seq.num_cached
