"""Who runs when, against a fake runner that computes nothing and a fake adapter table."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from multilora.adapters.mix import Mix
from multilora.config.engine import EngineConfig
from multilora.errors import CapacityError, ConfigError
from multilora.outputs import FinishReason
from multilora.sampling_params import SamplingParams
from multilora.scheduling.block_pool import ROOT_KEY, BlockPool, block_key
from multilora.scheduling.policies import Fcfs, View, policy_named
from multilora.scheduling.scheduler import Scheduler
from multilora.scheduling.scheduler_output import ChunkResult, SchedulerOutput, StepResult
from multilora.scheduling.sequence import Sequence

if TYPE_CHECKING:
    from collections.abc import Callable

EOS = 2


class FakeSlots:
    """A table of a few slots; mixes in `cold` are not loaded."""

    def __init__(self, num_slots: int = 8) -> None:
        self.num_slots = num_slots
        self.cold: set[Mix] = set()
        self.pins: Counter[Mix] = Counter()
        self.table: dict[Mix, int] = {}

    def ready(self, mix: Mix) -> bool:
        return mix not in self.cold

    def pin(self, mix: Mix) -> int | None:
        if not mix:
            self.pins[mix] += 1
            return -1
        if mix not in self.table:
            taken = {self.table[held] for held in self.table if self.pins[held]}
            free = [slot for slot in range(self.num_slots) if slot not in taken]
            if not free:
                return None
            self.table = {held: slot for held, slot in self.table.items() if slot != free[0]}
            self.table[mix] = free[0]
        self.pins[mix] += 1
        return self.table[mix]

    def unpin(self, mix: Mix) -> None:
        assert self.pins[mix] > 0
        self.pins[mix] -= 1


class House:
    """A scheduler, its pool and slots, and a runner that checks plans as the real one must trust.

    `content` is what the KV of each block position was computed for: (identity, the tokens up to
    there). A block that is reused too early or shared wrongly shows as a difference.
    """

    def __init__(self, num_blocks: int = 64, num_slots: int = 8, **settings: Any) -> None:
        config = EngineConfig(model="none", block_size=4, num_kv_blocks=num_blocks, **settings)
        self.pool = BlockPool(num_blocks, 4, config.enable_prefix_caching)
        self.slots = FakeSlots(num_slots)
        self.scheduler = Scheduler(config, self.pool, self.slots, max_model_len=256)
        self.config = config
        self.tokens: dict[int, list[int]] = {}  # by request slot, as the runner has them
        self.content: dict[tuple[int, int], tuple[bytes, tuple[int, ...]]] = {}
        self.count = 0

    def seq(self, prompt: list[int], mix: str = "", max_total: int = 256, **kw: Any) -> Sequence:
        params = SamplingParams(**{"max_tokens": None, **kw})
        self.count += 1
        seq = Sequence(
            seq_id=self.count,
            request_id=f"r{self.count}",
            index=0,
            params=params,
            prompt_ids=prompt,
            mix=((mix, 1.0),) if mix else (),
            identity=mix.encode(),
            seed=0,
            arrival=self.count,
            max_total=max_total,
            stop_ids=frozenset([EOS, *params.stop_token_ids]),
        )
        self.scheduler.add(seq)
        return seq

    def plan(self) -> SchedulerOutput | None:
        plan = self.scheduler.schedule()
        self.check()
        if plan is None:
            return None
        assert 0 < plan.num_tokens <= self.config.max_num_batched_tokens
        for slot in plan.freed_request_slots:
            del self.tokens[slot]
        for new in plan.new_sequences:
            assert new.request_slot not in self.tokens
            self.tokens[new.request_slot] = list(new.token_ids)
        return plan

    def run(
        self,
        plan: SchedulerOutput,
        token: Callable[[Sequence], int] = lambda _: 9,
        failed: int | None = None,
    ) -> StepResult:
        results = []
        for chunk in plan.chunks:
            seq = next(
                seq for seq in self.scheduler.running if seq.request_slot == chunk.request_slot
            )
            known = self.tokens[chunk.request_slot]
            assert chunk.slot == (self.slots.table[seq.mix] if seq.mix else -1)
            for position in range(chunk.start, chunk.start + chunk.count):
                where = chunk.blocks[position // 4], position % 4
                self.content[where] = seq.identity, tuple(known[: position + 1])
            for position in range(chunk.start + chunk.count):  # what attention reads
                where = chunk.blocks[position // 4], position % 4
                assert self.content[where] == (seq.identity, tuple(known[: position + 1]))
            assert chunk.samples == (chunk.start + chunk.count == len(known))
            new = token(seq) if chunk.samples else None
            if new is not None:
                known.append(new)
            wanted = seq.params.prompt_logprobs is not None and chunk.start < len(seq.prompt_ids)
            results.append(
                ChunkResult(
                    chunk.request_slot,
                    new,
                    None,
                    [] if wanted else None,
                    "failed" if chunk.request_slot == failed else None,
                )
            )
        return StepResult(tuple(results))

    def step(self, **kwargs: Any) -> list[Sequence] | None:
        plan = self.plan()
        if plan is None:
            return None
        advanced = self.scheduler.update(plan, self.run(plan, **kwargs))
        self.check()
        return advanced

    def check(self) -> None:
        self.scheduler.check_integrity()
        held = Counter(seq.mix for seq in self.scheduler.running)
        assert held == +self.slots.pins

    def check_empty(self) -> None:
        self.check()
        assert not self.scheduler.running
        assert not self.scheduler.waiting
        assert self.pool.num_free == self.pool.num_blocks


def test_a_sequence_is_prefilled_in_chunks_then_decoded_to_its_length() -> None:
    house = House(max_num_batched_tokens=4)
    seq = house.seq(list(range(10, 20)), max_tokens=3)
    spans = []
    while (plan := house.plan()) is not None:
        spans += [(chunk.start, chunk.count, chunk.samples) for chunk in plan.chunks]
        house.scheduler.update(plan, house.run(plan))
    assert spans == [
        (0, 4, False),
        (4, 4, False),
        (8, 2, True),
        (10, 1, True),
        (11, 1, True),
    ]
    assert seq.output_ids == [9, 9, 9]
    assert seq.finish_reason is FinishReason.LENGTH
    house.check_empty()


def test_decodes_share_the_budget_with_a_new_prefill() -> None:
    house = House(max_num_batched_tokens=6)
    house.seq([1, 3], max_tokens=9)
    house.step()
    house.seq(list(range(10, 20)))
    plan = house.plan()
    assert plan is not None
    assert [(c.request_slot, c.start, c.count) for c in plan.chunks] == [(0, 2, 1), (1, 0, 5)]
    assert [(n.request_slot, n.num_prompt, n.token_ids) for n in plan.new_sequences] == [
        (1, 10, list(range(10, 20)))
    ]


@pytest.mark.parametrize(
    ("params", "max_total", "tokens", "reason", "stop_reason"),
    [
        ({}, 256, [5, EOS], "stop", None),
        ({"stop_token_ids": [7]}, 256, [5, 7], "stop", 7),
        ({"stop_token_ids": [EOS]}, 256, [5, EOS], "stop", EOS),
        ({"min_tokens": 3, "max_tokens": 9}, 256, [EOS, EOS, EOS], "stop", None),
        ({"max_tokens": 2}, 256, [5, 5], "length", None),
        ({"max_tokens": 2}, 256, [5, EOS], "stop", None),
        ({}, 5, [5, 5], "length", None),
    ],
)
def test_a_sequence_ends_for_the_first_reason_that_holds(
    params: dict[str, Any], max_total: int, tokens: list[int], reason: str, stop_reason: int | None
) -> None:
    house = House()
    seq = house.seq([1, 3, 4], max_total=max_total, **params)
    for _ in tokens:
        assert seq.finish_reason is None
        assert house.step(token=lambda s: tokens[len(s.output_ids)]) == [seq]
    assert seq.output_ids == tokens
    assert seq.finish_reason is not None
    assert (seq.finish_reason.value, seq.stop_reason) == (reason, stop_reason)
    house.check_empty()


def test_a_failed_row_ends_with_an_error_and_publishes_nothing() -> None:
    house = House()
    bad, good = house.seq([1] * 9), house.seq([3] * 9)
    assert house.step(failed=0) == [bad, good]
    assert (bad.finish_reason, bad.output_ids) == (FinishReason.ERROR, [])
    assert good.finish_reason is None
    for token, found in ((1, 0), (3, 2)):
        first = block_key(ROOT_KEY, ((0, b""),), [token] * 4)
        keys = [first, block_key(first, ((0, b""),), [token] * 4)]
        assert len(house.pool.match(keys)) == found


def test_only_chunks_with_something_to_tell_are_reported() -> None:
    house = House(max_num_batched_tokens=4)
    house.seq(list(range(6)))
    assert house.step() == []
    assert len(house.step() or []) == 1
    scored = House(max_num_batched_tokens=4)
    seq = scored.seq(list(range(6)), prompt_logprobs=0)
    assert scored.step() == [seq]


def test_a_prefix_is_taken_from_the_cache_but_for_the_last_token() -> None:
    house = House()
    house.seq([1] * 8, max_tokens=1)
    house.step()
    again = house.seq([1] * 8, max_tokens=1)
    plan = house.plan()
    assert plan is not None
    assert (plan.chunks[0].start, plan.chunks[0].count, again.num_cached) == (4, 4, 4)
    house.scheduler.update(plan, house.run(plan))
    longer = house.seq([1] * 9, max_tokens=1)
    house.step()
    assert longer.num_cached == 8
    house.check_empty()


@pytest.mark.parametrize(
    ("mix", "params", "enabled"),
    [("other", {}, True), ("", {}, True), ("a", {"prompt_logprobs": 1}, True), ("a", {}, False)],
)
def test_no_prefix_is_shared_across_identities_or_when_all_logits_are_needed(
    mix: str, params: dict[str, Any], enabled: bool
) -> None:
    house = House(enable_prefix_caching=enabled)
    house.seq([1] * 9, mix="a", max_tokens=1)
    house.step()
    seq = house.seq([1] * 9, mix=mix, max_tokens=1, **params)
    house.step()
    assert seq.num_cached == 0


def test_outputs_are_published_too_for_the_next_turn() -> None:
    house = House()
    house.seq([1] * 3, max_tokens=6)
    while house.step():
        pass
    seq = house.seq([1] * 3 + [9] * 6)
    house.step()
    assert seq.num_cached == 8  # 3 + 5: the last token's KV was never computed


def test_the_last_arrival_is_preempted_and_recomputed() -> None:
    house = House(num_blocks=4)
    first, last = house.seq([1] * 7, max_tokens=8), house.seq([3] * 7, max_tokens=8)
    house.step()
    house.step()
    assert house.pool.num_free == 0
    plan = house.plan()
    assert plan is not None
    assert house.scheduler.num_preemptions == 1
    assert house.scheduler.running == [first]
    assert house.scheduler.waiting == [last]  # and not admitted in the same plan
    assert plan.freed_request_slots == (1,)
    assert (last.num_scheduled, last.blocks, last.request_slot) == (0, [], None)
    house.scheduler.update(plan, house.run(plan))
    while house.step():
        pass
    for seq in (first, last):
        assert len(seq.output_ids) == 8
    house.check_empty()


def test_a_preempted_sequence_finds_its_own_blocks_which_is_no_hit() -> None:
    house = House(num_blocks=5)
    first, last = house.seq([1] * 7, max_tokens=5), house.seq([3] * 7, max_tokens=5)
    while first.finish_reason is None:
        house.step()
    assert house.scheduler.waiting == [last]
    plan = house.plan()
    assert plan is not None
    assert (plan.chunks[0].start, plan.chunks[0].count) == (8, 1)
    assert plan.new_sequences[0].token_ids == [3] * 7 + [9] * 2
    assert last.num_cached == 0


def test_no_one_is_admitted_in_a_plan_that_preempts() -> None:
    house = House(num_blocks=4, max_num_batched_tokens=5, enable_prefix_caching=False)
    first, last = house.seq([1] * 7, max_tokens=8), house.seq([3] * 7, max_tokens=8)
    while house.scheduler.num_preemptions == 0:
        newcomer = house.seq([4])
        plan = house.plan()
        assert plan is not None
        house.scheduler.update(plan, house.run(plan))
        if house.scheduler.num_preemptions:
            assert plan.new_sequences == ()
        house.scheduler.abort(newcomer)
    assert house.pool.num_free == 1  # enough for a first chunk
    assert house.scheduler.waiting == [last]
    assert house.scheduler.running == [first]


def test_a_later_arrival_preempts_itself_rather_than_an_earlier_one() -> None:
    house = House(num_blocks=3)
    first, last = house.seq([1] * 5, max_tokens=3), house.seq([3] * 4, max_tokens=3)
    house.step()
    house.step()
    assert house.scheduler.running == [first]
    assert house.scheduler.waiting == [last]
    while house.step():
        pass
    assert len(last.output_ids) == 3


def test_a_sequence_without_blocks_is_not_overtaken() -> None:
    house = House(num_blocks=4)
    house.seq([1] * 9, max_tokens=2)
    house.step()
    big, small = house.seq([3] * 9, max_tokens=1), house.seq([4], max_tokens=1)
    house.step()
    assert house.scheduler.running == []
    assert house.scheduler.waiting == [big, small]
    assert house.step() == [big, small]


@pytest.mark.parametrize("why", ["cold", "no slot"])
def test_a_sequence_without_its_adapter_is_skipped(why: str) -> None:
    house = House(num_slots=1)
    house.seq([1], mix="a", max_tokens=3)
    house.step()
    if why == "cold":
        house.slots.cold.add((("b", 1.0),))
    blocked = house.seq([1], mix="b", max_tokens=1)
    same, base = house.seq([1], mix="a", max_tokens=9), house.seq([1], max_tokens=9)
    house.step()
    assert house.scheduler.waiting == [blocked]
    assert same in house.scheduler.running
    assert base in house.scheduler.running
    house.slots.cold.clear()
    for seq in list(house.scheduler.running):
        house.scheduler.abort(seq)
    assert house.step() == [blocked]


def test_a_sequence_without_a_slot_is_overtaken_only_so_often() -> None:
    house = House(num_slots=1, max_num_seqs=3)
    house.seq([1], mix="a", max_tokens=4)
    house.step()
    blocked = house.seq([1], mix="b", max_tokens=1)
    for _ in range(
        40
    ):  # some "a" always runs or waits, so that its slot never falls free by itself
        house.seq([1], mix="a", max_tokens=4)
        house.step()
        if blocked not in house.scheduler.waiting:
            break
    assert blocked.num_overtaken == 3
    assert blocked.finish_reason is FinishReason.LENGTH


def test_the_base_needs_no_slot_and_may_pass_a_sequence_that_waits_for_one() -> None:
    house = House(num_slots=1, max_num_seqs=3)
    house.seq([1], mix="a", max_tokens=40)
    house.step()
    blocked = house.seq([1], mix="b", max_tokens=1)
    for _ in range(6):
        base = house.seq([1], max_tokens=1)
        assert house.step() != []
        assert base.finish_reason is FinishReason.LENGTH
    assert blocked.num_overtaken == 0
    assert blocked in house.scheduler.waiting


@pytest.mark.parametrize("caching", [True, False])
def test_later_answers_to_a_request_share_the_prompt_blocks_of_the_first(caching: bool) -> None:
    house = House(max_num_batched_tokens=8, enable_prefix_caching=caching)
    answers = [house.seq([1] * 14, n=3, max_tokens=2) for _ in range(3)]
    for index, answer in enumerate(answers):
        answer.index, answer.arrival = index, answers[0].arrival
    prompt_tokens = 0
    while (plan := house.plan()) is not None:
        prompt_tokens += sum(min(c.count, max(14 - c.start, 0)) for c in plan.chunks)
        house.scheduler.update(plan, house.run(plan))
    assert prompt_tokens == (14 + 2 + 2 if caching else 3 * 14)
    assert all(len(answer.output_ids) == 2 for answer in answers)
    house.check_empty()


def test_answers_whose_whole_prompt_is_scored_wait_for_none() -> None:
    house = House(max_num_batched_tokens=64)
    answers = [house.seq([1] * 14, n=2, prompt_logprobs=0, max_tokens=1) for _ in range(2)]
    answers[1].index, answers[1].arrival = 1, answers[0].arrival
    assert house.step() == answers


def test_nothing_is_planned_while_every_adapter_is_cold() -> None:
    house = House()
    house.slots.cold.add((("a", 1.0),))
    house.seq([1], mix="a")
    assert house.plan() is None
    house.slots.cold.clear()
    assert house.plan() is not None


def test_request_slots_are_limited_and_reused() -> None:
    house = House(max_num_seqs=2)
    seqs = [house.seq([1], max_tokens=1) for _ in range(5)]
    assert house.step() == seqs[:2]
    assert house.step() == seqs[2:4]
    assert house.step() == seqs[4:]
    house.check_empty()


def test_abort_works_in_every_state() -> None:
    house = House(max_num_seqs=2)
    running, flying, waiting = (house.seq([n] * 5) for n in (3, 4, 5))
    house.scheduler.abort(waiting)
    assert house.scheduler.waiting == [running, flying]
    house.step()
    house.scheduler.abort(running)
    house.check()
    assert running.request_slot is None
    plan = house.plan()
    assert plan is not None
    assert plan.freed_request_slots == (0,)
    house.scheduler.abort(flying)
    house.check()
    assert flying.blocks, "the runner still writes them"
    outputs = list(flying.output_ids)
    assert house.scheduler.update(plan, house.run(plan)) == []
    assert flying.output_ids == outputs
    assert {s.finish_reason for s in (running, flying, waiting)} == {FinishReason.ABORT}
    house.scheduler.abort(flying)
    house.check_empty()


def test_a_preempted_sequence_can_be_aborted() -> None:
    house = House(num_blocks=4)
    house.seq([1] * 7, max_tokens=8)
    last = house.seq([3] * 7, max_tokens=8)
    while last not in house.scheduler.waiting or not last.output_ids:
        house.step()
    house.scheduler.abort(last)
    while house.step():
        pass
    house.check_empty()


def test_the_engine_can_finish_a_sequence_for_a_stop_string() -> None:
    house = House()
    seq, ended = house.seq([1] * 5), house.seq([3] * 5, max_tokens=1)
    house.step()
    for each in (seq, ended):
        house.scheduler.finish(each, FinishReason.STOP, "END")
        assert (each.finish_reason, each.stop_reason) == (FinishReason.STOP, "END")
    house.scheduler.abort(seq)
    assert seq.finish_reason is FinishReason.STOP
    house.check_empty()


def test_what_can_never_fit_is_refused_and_what_fills_the_pool_ends() -> None:
    house = House(num_blocks=2)
    with pytest.raises(CapacityError, match="KV pool of 2 blocks"):
        house.seq([1] * 8)
    seq = house.seq([1] * 7, max_tokens=100)
    assert house.step() == [seq]
    assert seq.finish_reason is FinishReason.LENGTH
    with pytest.raises(CapacityError, match="max_model_len 256"):
        House(num_blocks=100).seq([1] * 256)
    house.check_empty()


def test_plans_are_committed_once_and_in_their_order() -> None:
    house = House()
    house.seq([1])
    first, second = house.scheduler.schedule(), house.scheduler.schedule()
    assert first is not None
    assert second is not None
    results = [StepResult((ChunkResult(0, 9, None, None),)) for _ in range(2)]
    house.seq([1])
    third = house.scheduler.schedule()
    assert third is not None
    house.scheduler.update(first, results[0])
    with pytest.raises(AssertionError, match="not the oldest step"):
        house.scheduler.update(third, results[0])


def answer(plan: SchedulerOutput, token: int = 9) -> StepResult:
    results = (
        ChunkResult(c.request_slot, token if c.samples else None, None, None) for c in plan.chunks
    )
    return StepResult(tuple(results))


def test_a_plan_ahead_counts_on_a_token_that_is_not_sampled_yet() -> None:
    house = House()
    seq = house.seq([1, 2, 3])
    first, second = house.scheduler.schedule(), house.scheduler.schedule()
    assert first is not None
    assert second is not None
    assert [(c.start, c.count, c.samples) for c in first.chunks] == [(0, 3, True)]
    assert [(c.start, c.count, c.samples) for c in second.chunks] == [(3, 1, True)]
    assert (seq.num_tokens, seq.num_scheduled, seq.num_computed, seq.num_pending) == (3, 4, 0, 2)
    house.scheduler.update(first, answer(first))
    house.check()
    assert (seq.num_tokens, seq.num_scheduled, seq.num_computed, seq.num_pending) == (4, 4, 3, 1)
    house.scheduler.update(second, answer(second))
    assert seq.output_ids == [9, 9]


def test_nothing_is_planned_beyond_a_length_that_is_known_to_end_it() -> None:
    house = House()
    house.seq([1, 2], max_tokens=2)
    house.seq([1, 2], max_total=4)
    plans = [house.scheduler.schedule(), house.scheduler.schedule()]
    assert all(plan is not None and len(plan.chunks) == 2 for plan in plans)
    assert house.scheduler.schedule() is None
    for plan in plans:
        assert plan is not None
        house.scheduler.update(plan, answer(plan))
    assert not house.scheduler.running
    house.check()


def test_what_a_plan_ahead_computed_for_an_ended_sequence_is_dropped() -> None:
    house = House()
    seq = house.seq([1, 2, 3])
    first, second = house.scheduler.schedule(), house.scheduler.schedule()
    assert first is not None
    assert second is not None
    assert house.scheduler.update(first, answer(first, EOS)) == [seq]
    house.check()
    assert seq.finish_reason == FinishReason.STOP
    assert house.scheduler.running == [seq]  # its blocks are still being written
    assert house.scheduler.schedule() is None
    assert house.scheduler.update(second, answer(second)) == []
    assert seq.output_ids == [EOS]
    assert house.pool.num_free == house.pool.num_blocks


def test_an_aborted_sequence_holds_its_blocks_until_its_plans_are_committed() -> None:
    house = House()
    seq = house.seq([1, 2, 3])
    plans = [house.scheduler.schedule(), house.scheduler.schedule()]
    house.scheduler.abort(seq)
    for plan in plans:
        house.check()
        assert house.scheduler.running == [seq]
        assert plan is not None
        assert house.scheduler.update(plan, answer(plan)) == []
    house.check()
    assert not house.scheduler.running


def test_nothing_is_taken_from_a_sequence_that_is_being_computed() -> None:
    house = House(num_blocks=4)
    house.seq([1] * 7)
    house.seq([2] * 7)
    first = house.scheduler.schedule()  # both, two blocks each, full with the next token
    second = house.scheduler.schedule()
    assert first is not None
    assert second is not None
    assert house.scheduler.schedule() is None  # a third block is needed, and none is free
    house.scheduler.update(first, answer(first))
    assert house.scheduler.schedule() is None
    house.scheduler.update(second, answer(second))
    third = house.scheduler.schedule()
    assert third is not None
    assert len(third.chunks) == house.scheduler.num_preemptions == 1
    house.check()


def test_fcfs_is_by_arrival_and_an_unknown_policy_is_named() -> None:
    house = House()
    seqs = [house.seq([1]) for _ in range(3)]
    assert Fcfs().order(seqs[::-1], View((), 0)) == seqs
    with pytest.raises(ConfigError, match="'lifo'; known policies: fcfs"):
        policy_named("lifo")
    with pytest.raises(ConfigError, match="lifo"):
        House(policy="lifo")


ACTION = st.one_of(
    st.tuples(
        st.just("add"),
        st.integers(1, 12),  # prompt length
        st.integers(4, 12),  # max_tokens
        st.sampled_from(["", "a", "b", "c"]),
        st.booleans(),  # prompt logprobs
    ),
    st.tuples(st.just("step"), st.integers(1, 5)),
    st.tuples(st.sampled_from(["abort", "abort in flight", "finish"]), st.integers(0, 9)),
    st.tuples(st.just("cold"), st.sampled_from(["a", "b", "c"])),
)


def act(house: House, seqs: list[Sequence], action: tuple[Any, ...]) -> None:
    """Does one of the actions to the house."""
    scheduler = house.scheduler
    if action[0] == "add":
        _, length, max_tokens, mix, scored = action
        prompt = [3 + i // 8 % 2 for i in range(length)]  # prompts often share a prefix
        logprobs = 0 if scored and length % 3 == 0 else None
        kwargs = {"max_tokens": max_tokens, "prompt_logprobs": logprobs}
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
