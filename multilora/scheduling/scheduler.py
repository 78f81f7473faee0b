"""Decides what each step computes: who runs, how many tokens, with which slots and blocks.

One step is `schedule` -> (the runner computes it) -> `update`. Sequences run in order of arrival
and grow block by block; when the blocks run out, the one that arrived last gives its own back and
is computed again later. So the earliest one always advances, and every sequence ends.

A step may be scheduled while those before it are computed: it counts tokens that are being sampled
without knowing them. A sequence that turns out to have ended meanwhile was computed in vain once.

What lasts of a sequence are its tokens with their logprobs, and why it ended. All else, and all
that the scheduler keeps, can be made anew from that: `reset` does, after a step that raised.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from ..errors import CapacityError
from ..outputs import FinishReason
from .block_pool import BlockPool
from .holdings import AdapterSlots, Holdings, WithoutSlot
from .policies import View, by_arrival, checked_order, policy_named
from .prefix_cache import PrefixCache
from .scheduler_output import ChunkResult, NewSequence, ScheduledChunk, SchedulerOutput, StepResult
from .sequence import Sequence
from .waiting_queue import WaitingQueue

if TYPE_CHECKING:
    from collections.abc import Collection, Container

    from ..config.engine import EngineConfig


class Scheduler:
    """The waiting and the running sequences, and all that the running ones hold."""

    def __init__(
        self, config: EngineConfig, pool: BlockPool, slots: AdapterSlots, max_model_len: int
    ) -> None:
        """A ConfigError names the known policies if `config.policy` is not one."""
        self.waiting = WaitingQueue()
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self.num_prompt_tokens = self.num_generated_tokens = 0  # computed, sampled
        self._considered: Sequence | None = None  # by `schedule`, now or when it raised
        self._pool, self._adapters = pool, slots
        self._holdings = Holdings(pool, slots, config.max_num_seqs)
        self._policy = policy_named(config.policy)
        self._max_num_seqs = config.max_num_seqs
        self._max_tokens = config.max_num_batched_tokens
        self._max_model_len = max_model_len
        self._prefixes = PrefixCache(pool)
        # request slot -> sequence of each step that is being computed, the oldest first
        self._in_flight: deque[dict[int, Sequence]] = deque()

    def add(self, *seqs: Sequence) -> None:
        """Lets sequences wait for their turn: all, or what `check` raises."""
        self.check(*seqs)
        for seq in seqs:
            self.waiting.add(seq)

    def check(self, *seqs: Sequence) -> None:
        """Raises a CapacityError if one of these sequences could never have its turn.

        Their `max_total` is lowered to what the model's length and the KV pool can hold.
        """
        room = self._pool.num_blocks * self._pool.block_size
        for seq in seqs:
            self._check_fits(seq, room)
            seq.max_total = min(seq.max_total, self._max_model_len, room)

    def _check_fits(self, seq: Sequence, room: int) -> None:
        need = len(seq.prompt_ids) + 1
        limits = [
            (self._max_model_len, "max_model_len", "max_model_len"),
            (room, f"the KV pool of {self._pool.num_blocks} blocks and its", "num_kv_blocks"),
        ]
        limit, what, setting = min(limits)
        if need > limit:
            raise CapacityError(
                f"request {seq.request_id}: a prompt of {need - 1} tokens and one new token exceed "
                f"{what} {limit} tokens; shorten the prompt or raise {setting}"
            )

    def abort(self, seq: Sequence) -> None:
        """Ends a sequence in any state; one that has ended stays as it is."""
        if seq.finish_reason is None:
            self.finish(seq, FinishReason.ABORT, None)

    def fail(self, seq: Sequence, reason: str) -> None:
        """Ends a sequence that cannot be computed; what it computed is shared with nobody.

        One that had ended, and was not told yet, ends otherwise.
        """
        seq.error = reason
        if seq.finish_reason is None:
            self.finish(seq, FinishReason.ERROR)
        else:
            seq.finish_reason, seq.stop_reason = FinishReason.ERROR, None

    def finish(
        self, seq: Sequence, reason: FinishReason, stop_reason: int | str | None = None
    ) -> None:
        """Ends a sequence for a reason that the caller found, such as a stop string.

        What it holds is free at once, or at the update of the last step that computes it.
        """
        had_ended = seq.finish_reason is not None
        seq.stop_reason, seq.finish_reason = stop_reason, reason
        if had_ended:
            return
        if seq in self.waiting:
            self.waiting.remove(seq)
            self._prefixes.forget(seq)
        elif seq.request_slot is not None and not seq.in_flight:
            self._retire(seq)

    def schedule(self, only: Container[int] | None = None) -> SchedulerOutput | None:
        """The next step, or None when nothing can run before those in flight are updated.

        With `only` no other seq_ids take part. `freed_request_slots` are freed before
        `new_sequences` take theirs: one may be in both.
        """
        wishes = self._wishes(only)
        if self._in_flight and self._lacks_blocks(wishes):
            return None  # nothing is taken from a sequence that is being computed
        chunks: list[ScheduledChunk] = []
        before = self.num_preemptions
        budget = self._plan_running(wishes, chunks)
        # Blocks that a preempted sequence gave up are not for a newcomer that arrived later.
        new_sequences: list[NewSequence] = []
        if self.num_preemptions == before:
            new_sequences = self._plan_waiting(chunks, budget, only)
        self._considered = None
        if not chunks:
            return None
        running = {seq.request_slot: seq for seq in self.running}
        self._in_flight.append({c.request_slot: running[c.request_slot] for c in chunks})
        return SchedulerOutput(
            new_sequences=tuple(new_sequences),
            chunks=tuple(chunks),
            freed_request_slots=self._holdings.take_freed(),
        )

    def update(self, output: SchedulerOutput, result: StepResult) -> list[Sequence]:
        """Takes in the result of the oldest step; the sequences with something to tell.

        That is a new token, prompt logprobs or an error, in the order of the chunks. The result
        for a sequence that was ended in the meantime is dropped.
        """
        in_flight = self._in_flight[0]
        assert [c.request_slot for c in output.chunks] == list(in_flight), "not the oldest step"
        assert [c.request_slot for c in result.chunks] == list(in_flight), "not of this step"
        advanced = []
        for chunk, found in zip(output.chunks, result.chunks, strict=True):
            seq = in_flight[chunk.request_slot]
            seq.num_computed += chunk.count
            seq.num_pending -= chunk.samples
            if seq.finish_reason is None:
                self._advance(seq, chunk, found)
                told = (found.error, found.token, found.prompt_logprobs)
                if any(part is not None for part in told):
                    advanced.append(seq)
            if seq.finish_reason is not None and not seq.in_flight:
                self._retire(seq)
        self._in_flight.popleft()
        return advanced

    # Failures -------------------------------------------------------------------------------------

    @property
    def num_in_flight(self) -> int:
        """Steps that are being computed."""
        return len(self._in_flight)

    def involved(self) -> dict[int, int]:
        """What may be at fault for an exception: seq_id -> how far it was to be computed.

        That is all that was in flight; or, when `schedule` raised, the sequence that it considered.
        """
        if self._considered is not None:
            return {self._considered.seq_id: self._considered.num_scheduled + 1}
        flying = (seq for step in self._in_flight for seq in step.values())
        return {seq.seq_id: seq.num_scheduled for seq in flying if seq.finish_reason is None}

    def halve_budget(self) -> int:
        """Makes the steps to come half as large; their tokens at most."""
        self._max_tokens = max(self._max_tokens // 2, 1)
        return self._max_tokens

    def reset(self, seqs: Collection[Sequence]) -> None:
        """Forgets all steps: these sequences wait, and nobody holds anything. Idempotent.

        The caller resets what the sequences held: blocks, pins, and the runner's request slots.
        """
        self._considered = None
        self._in_flight.clear()
        self._holdings.reset()
        self.running, self.waiting = [], WaitingQueue()
        for seq in seqs:
            seq.rewind()
        self.waiting = WaitingQueue(seq for seq in seqs if seq.finish_reason is None)
        self._prefixes.keep({seq.seq_id for seq in self.waiting})

    def check_integrity(self) -> None:
        """Asserts that what the sequences hold is what the pool and the tables say."""
        self.waiting.check_integrity()
        self._holdings.check_integrity(self.running, tuple(self.waiting))
        flying = [(slot, seq) for step in self._in_flight for slot, seq in step.items()]
        kept = all(seq.request_slot == slot for slot, seq in flying)
        assert kept, "a request slot was taken from a step in flight"
        assert self._considered is None, "a schedule was left half-made"
        for seq in self.waiting:
            assert seq.request_slot is None, "a waiting sequence has a request slot"
            assert not seq.blocks, "a waiting sequence has blocks"
            assert seq.num_scheduled == seq.num_computed == seq.num_pending == 0
            assert seq.finish_reason is None
        for seq in self.running:
            assert seq.num_computed <= seq.num_scheduled <= seq.num_expected
            steps = sum(one is seq for _, one in flying)
            assert seq.in_flight == (steps > 0)
            assert seq.num_pending <= steps
            assert steps or seq.finish_reason is None, "an ended sequence still runs"
        self._prefixes.check_integrity({seq.seq_id for seq in [*self.waiting, *self.running]})

    # Planning -------------------------------------------------------------------------------------

    def _wishes(self, only: Container[int] | None) -> list[tuple[Sequence, int]]:
        """The running sequences that have tokens to compute, by arrival, with how many."""
        return [
            (seq, seq.num_expected - seq.num_scheduled)
            for seq in sorted(self.running, key=by_arrival)
            if seq.num_expected > seq.num_scheduled and not seq.is_ending
            if only is None or seq.seq_id in only
        ]

    def _lacks_blocks(self, wishes: list[tuple[Sequence, int]]) -> bool:
        budget, need = self._max_tokens, 0
        for seq, wish in wishes:
            count = min(wish, budget)
            budget -= count
            need += self._holdings.new_blocks(seq, count)
        return need > self._pool.num_free

    def _plan_running(
        self, wishes: list[tuple[Sequence, int]], chunks: list[ScheduledChunk]
    ) -> int:
        """Appends the running sequences' chunks; the token budget left."""
        budget = self._max_tokens
        for seq, wish in wishes:
            self._considered = seq
            count = min(wish, budget)
            if seq.request_slot is None or not count:  # just preempted, or no budget left
                continue
            self._make_room(seq, count)
            if seq.request_slot is not None:
                chunks.append(self._schedule(seq, count))
                budget -= count
        return budget

    def _plan_waiting(
        self, chunks: list[ScheduledChunk], budget: int, only: Container[int] | None
    ) -> list[NewSequence]:
        """Admits waiting sequences and appends their first chunks."""
        new_sequences: list[NewSequence] = []
        can_admit = budget and self._holdings.has_request_slot
        if not can_admit or not self.waiting.has_any(self._adapters.resident()):
            return new_sequences  # before a long queue is gone through
        without_slot = WithoutSlot(self._max_num_seqs)
        upcoming, num_awaiting = self._prefixes.upcoming(self.running), 0
        view = View(tuple(self.running), self._pool.num_free)
        self._considered = None  # a policy that raises is at fault itself
        order = checked_order(self._policy, tuple(self.waiting), view)
        for seq in order:
            is_full = not budget or not self._holdings.has_request_slot
            is_full = is_full or num_awaiting >= self._max_num_seqs
            if is_full or without_slot.covers(self.waiting.mixes):
                break
            if only is not None and seq.seq_id not in only:
                continue
            self._considered = seq
            if self._prefixes.awaits(seq, upcoming):
                num_awaiting += 1
                continue
            slot = self._slot_for(seq, without_slot)
            if slot is None:
                continue
            count = self._take_blocks(seq, budget)
            if not count:
                self._adapters.unpin(seq.mix)
                break  # a smaller one must not overtake it again and again
            new_sequences.append(self._admit(seq, slot))
            chunks.append(self._schedule(seq, count))
            budget -= count
            upcoming |= self._prefixes.upcoming((seq,))
            if seq.mix:
                without_slot.overtake()
        return new_sequences

    def _slot_for(self, seq: Sequence, without_slot: WithoutSlot) -> int | None:
        """The pinned slot of a waiting sequence, or None if it must wait on."""
        if not self._adapters.ready(seq.mix):
            return None
        slot = self._adapters.pin(seq.mix) if without_slot.lets_pass(seq.mix) else None
        if slot is None:
            without_slot.add(seq)
        return slot

    def _make_room(self, seq: Sequence, count: int) -> None:
        """Preempts from the last arrival on until `seq` can grow, itself if it is the last."""
        while seq.request_slot is not None and self._holdings.lacks_blocks(seq, count):
            last = max(self.running, key=by_arrival)
            assert not last.in_flight
            self._release(last)
            last.num_scheduled = last.num_computed = 0
            self.waiting.add(last)
            self.num_preemptions += 1

    def _take_blocks(self, seq: Sequence, budget: int) -> int:
        """Takes a waiting sequence's cached prefix; the size of its first chunk, 0 = no room."""
        cached = self._prefixes.match(seq)
        self._pool.acquire(cached)
        start = len(cached) * self._pool.block_size
        count = min(seq.num_tokens - start, budget)
        if self._pool.blocks_for(start + count) - len(cached) > self._pool.num_free:
            self._pool.free(cached)
            return 0
        seq.blocks = cached
        seq.num_scheduled = seq.num_computed = start
        return count

    def _admit(self, seq: Sequence, slot: int) -> NewSequence:
        """Moves a sequence that has its slot and its cached prefix from waiting to running."""
        if seq.num_cached is None:  # the first admission, not the return after a preemption
            seq.num_cached = seq.num_computed
        self.waiting.remove(seq)
        self.running.append(seq)
        return NewSequence(
            request_slot=self._holdings.admit(seq, slot),
            token_ids=seq.tokens(0, seq.num_tokens),
            num_prompt=len(seq.prompt_ids),
            params=seq.params,
            seed=seq.seed,
            stop_ids=seq.stop_ids,
            bad_words=seq.bad_words,
        )

    def _schedule(self, seq: Sequence, count: int) -> ScheduledChunk:
        """The next `count` tokens of a running sequence, for which there is room."""
        assert seq.request_slot is not None
        self._holdings.grow(seq, count)
        start = seq.num_scheduled
        end = start + count
        samples = end == seq.num_expected
        seq.num_scheduled, seq.num_pending = end, seq.num_pending + samples
        return ScheduledChunk(
            request_slot=seq.request_slot,
            start=start,
            count=count,
            slot=self._holdings.adapter_slot(seq),
            blocks=tuple(seq.blocks),
            samples=samples,
            adapter_start=seq.adapter_start,
        )

    # Updating -------------------------------------------------------------------------------------

    def _advance(self, seq: Sequence, chunk: ScheduledChunk, found: ChunkResult) -> None:
        """Takes in the result of one chunk, and sets the finish reason if it was the last."""
        self.num_prompt_tokens += max(min(seq.num_computed, len(seq.prompt_ids)) - chunk.start, 0)
        if found.error is not None:  # what it computed is not to be shared
            seq.error, seq.finish_reason = found.error, FinishReason.ERROR
            return
        self._prefixes.publish(seq, chunk.start)
        if found.prompt_logprobs:  # after a preemption the first ones are there already
            seq.prompt_logprobs += found.prompt_logprobs[len(seq.prompt_logprobs) - chunk.start :]
        assert (found.token is not None) == chunk.samples, "a token where none is due, or none"
        if found.token is not None:
            if found.logprobs is not None:
                seq.output_logprobs.append(found.logprobs)
            # With that it has the token, whatever is raised from now on.
            seq.output_ids.append(found.token)
            self.num_generated_tokens += 1
            seq.end_if_due()

    def _retire(self, seq: Sequence) -> None:
        """Frees what a sequence that has ended holds."""
        self._release(seq)
        self._prefixes.forget(seq)

    def _release(self, seq: Sequence) -> None:
        self.running.remove(seq)
        self._holdings.release(seq)
