"""Decides what each step computes: who runs, how many tokens, in which row, slot and blocks.

One step is `plan` -> (the runner computes it) -> `commit`. Sequences run in order of arrival and
grow block by block; when the blocks run out, the one that arrived last gives its own back and is
computed again later. So the earliest one always advances, and every sequence ends.

A plan may be made before those before it are committed: it counts tokens that are being sampled
without knowing them. A sequence that turns out to have ended meanwhile was computed in vain once.
"""

from __future__ import annotations

import heapq
from collections import deque
from typing import TYPE_CHECKING, Protocol

from ..adapters.mix import Mix
from ..errors import CapacityError
from ..outputs import FinishReason
from .block_pool import ROOT_KEY, BlockPool, block_key
from .policies import View, by_arrival, policy_named
from .scheduler_output import ChunkResult, NewSequence, ScheduledChunk, SchedulerOutput, StepResult
from .sequence import Sequence

if TYPE_CHECKING:
    from ..config.engine import EngineConfig


class AdapterSlots(Protocol):
    """Who knows which mixes are loaded, and which have a slot of the adapter table."""

    def ready(self, mix: Mix) -> bool:
        """Whether the mix's weights are at hand; never waits."""

    def pin(self, mix: Mix) -> int | None:
        """The mix's slot, held until `unpin`; -1 for the base, None when there is no room now."""

    def unpin(self, mix: Mix) -> None:
        """Gives back one `pin`."""


class Scheduler:
    """The waiting and the running sequences, and all that the running ones hold."""

    def __init__(
        self, config: EngineConfig, pool: BlockPool, slots: AdapterSlots, max_model_len: int
    ) -> None:
        """A ConfigError names the known policies if `config.policy` is not one."""
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self._pool = pool
        self._adapters = slots
        self._policy = policy_named(config.policy)
        self._max_num_seqs = config.max_num_seqs
        self._max_tokens = config.max_num_batched_tokens
        self._max_model_len = max_model_len
        self._free_rows = list(range(config.max_num_seqs))  # a heap: low rows first
        self._left_rows: list[int] = []  # left since the last plan
        self._slots: dict[int, int] = {}  # row -> adapter slot
        self._keys: dict[int, list[bytes]] = {}  # seq_id -> keys of its full blocks, once admitted
        # row -> sequence of each plan that is being computed, the oldest first
        self._in_flight: deque[dict[int, Sequence]] = deque()

    def add(self, seq: Sequence) -> None:
        """Lets a sequence wait for its turn; a CapacityError if it could never have one.

        Its `max_total` is lowered to what the model's length and the KV pool can hold.
        """
        need = len(seq.prompt_ids) + 1
        room = self._pool.num_blocks * self._pool.block_size
        if need > self._max_model_len:
            raise CapacityError(
                f"request {seq.request_id}: a prompt of {need - 1} tokens and one new token exceed "
                f"max_model_len {self._max_model_len}; shorten the prompt or raise max_model_len"
            )
        if need > room:
            raise CapacityError(
                f"request {seq.request_id}: a prompt of {need - 1} tokens and one new token exceed "
                f"the KV pool of {self._pool.num_blocks} blocks of {self._pool.block_size} tokens; "
                "shorten the prompt or raise num_kv_blocks"
            )
        seq.max_total = min(seq.max_total, self._max_model_len, room)
        self.waiting.append(seq)

    def abort(self, seq: Sequence) -> None:
        """Ends a sequence in any state; one that has ended stays as it is."""
        if seq.finish_reason is None:
            self.finish(seq, FinishReason.ABORT, None)

    def finish(
        self, seq: Sequence, reason: FinishReason, stop_reason: int | str | None = None
    ) -> None:
        """Ends a sequence for a reason that the caller found, such as a stop string.

        What it holds is free at once, or at the commit of the last plan that computes it.
        """
        seq.finish_reason, seq.stop_reason = reason, stop_reason
        if seq in self.waiting:
            self.waiting.remove(seq)
            self._keys.pop(seq.seq_id, None)
        elif seq.row is not None and not seq.in_flight:
            self._retire(seq)

    def schedule(self) -> SchedulerOutput | None:
        """The next step, or None when nothing can run before the plans in flight are committed.

        `freed_rows` are freed before `new_rows` are taken, and a row may be in both.
        """
        wishes = self._wishes()
        if self._in_flight and self._lacks_blocks(wishes):
            return None  # nothing is taken from a sequence that is being computed
        chunks: list[ScheduledChunk] = []
        before = self.num_preemptions
        budget = self._plan_running(wishes, chunks)
        # Blocks that a preempted sequence gave up are not for a newcomer that arrived later.
        new_rows = self._plan_waiting(chunks, budget) if self.num_preemptions == before else []
        if not chunks:
            return None
        rows = {seq.row: seq for seq in self.running}
        self._in_flight.append({chunk.row: rows[chunk.row] for chunk in chunks})
        freed, self._left_rows = tuple(self._left_rows), []
        return SchedulerOutput(new_rows=tuple(new_rows), chunks=tuple(chunks), freed_rows=freed)

    def update(self, plan: SchedulerOutput, result: StepResult) -> list[Sequence]:
        """Takes in what came of the oldest plan; the sequences with something to tell.

        That is a new token, prompt logprobs or an error, in the order of the chunks. What came of
        a sequence that was ended in the meantime is dropped.
        """
        in_flight = self._in_flight.popleft()
        assert [chunk.row for chunk in plan.chunks] == list(in_flight), "not the oldest plan"
        assert [row.row for row in result.rows] == list(in_flight), "not of this plan"
        advanced = []
        for chunk, row in zip(plan.chunks, result.rows, strict=True):
            seq = in_flight[chunk.row]
            seq.num_computed += chunk.count
            seq.num_pending -= chunk.samples
            if seq.finish_reason is None:
                self._advance(seq, chunk, row)
                if row.failed or row.token is not None or row.prompt_logprobs is not None:
                    advanced.append(seq)
            if seq.finish_reason is not None and not seq.in_flight:
                self._retire(seq)
        return advanced

    def sequence(self, row: int) -> Sequence:
        """The sequence that the oldest plan in flight computes in a row; ask before `commit`."""
        return self._in_flight[0][row]

    def check_integrity(self) -> None:
        """Asserts that what the sequences hold is what the pool and the tables say."""
        self._pool.check_integrity(seq.blocks for seq in [*self.waiting, *self.running])
        rows = sorted(seq.row for seq in self.running if seq.row is not None)
        assert len(rows) == len(self.running), "a running sequence has no row"
        assert sorted([*rows, *self._free_rows]) == list(range(self._max_num_seqs)), "rows differ"
        assert sorted(self._slots) == rows, "pins differ"
        flying = [(row, seq) for plan in self._in_flight for row, seq in plan.items()]
        assert all(seq.row == row for row, seq in flying), "a row was taken from a plan in flight"
        for seq in self.waiting:
            assert seq.row is None, "a waiting sequence has a row"
            assert not seq.blocks, "a waiting sequence has blocks"
            assert seq.num_scheduled == seq.num_computed == seq.num_pending == 0
            assert seq.finish_reason is None
        for seq in self.running:
            assert seq.num_computed <= seq.num_scheduled <= seq.num_expected
            assert len(seq.blocks) == self._pool.blocks_for(seq.num_scheduled)
            plans = sum(one is seq for _, one in flying)
            assert seq.in_flight == (plans > 0)
            assert seq.num_pending <= plans
            assert plans or seq.finish_reason is None, "an ended sequence still runs"
        assert self._keys.keys() <= {seq.seq_id for seq in [*self.waiting, *self.running]}

    # Planning -------------------------------------------------------------------------------------

    def _wishes(self) -> list[tuple[Sequence, int]]:
        """The running sequences that have tokens to compute, by arrival, with how many."""
        return [
            (seq, seq.num_expected - seq.num_scheduled)
            for seq in sorted(self.running, key=by_arrival)
            if seq.num_expected > seq.num_scheduled and not self._ends(seq)
        ]

    def _ends(self, seq: Sequence) -> bool:
        """Whether it has ended, or will when the tokens that are being sampled arrive."""
        count = len(seq.output_ids) + seq.num_pending
        return (
            seq.finish_reason is not None
            or count == seq.params.max_tokens
            or (seq.num_pending > 0 and seq.num_expected >= seq.max_total)
        )

    def _lacks_blocks(self, wishes: list[tuple[Sequence, int]]) -> bool:
        budget, need = self._max_tokens, 0
        for seq, wish in wishes:
            count = min(wish, budget)
            budget -= count
            need += self._new_blocks(seq, count)
        return need > self._pool.num_free

    def _plan_running(
        self, wishes: list[tuple[Sequence, int]], chunks: list[ScheduledChunk]
    ) -> int:
        """Appends the running sequences' chunks; the token budget left."""
        budget = self._max_tokens
        for seq, wish in wishes:
            count = min(wish, budget)
            if seq.row is None or not count:  # just preempted, or no budget left
                continue
            self._make_room(seq, count)
            if seq.row is not None:
                chunks.append(self._schedule(seq, count))
                budget -= count
        return budget

    def _plan_waiting(self, chunks: list[ScheduledChunk], budget: int) -> list[NewSequence]:
        """Admits waiting sequences and appends their first chunks."""
        new_rows: list[NewSequence] = []
        if not budget or not self._free_rows:  # before a long queue is put in order
            return new_rows
        without_slot: list[Sequence] = []
        leading = {seq.arrival for seq in self.running if self._leads(seq)}
        view = View(tuple(self.running), self._pool.num_free)
        for seq in self._policy.order(tuple(self.waiting), view):
            if not budget or not self._free_rows:
                break
            slot = self._slot_for(seq, without_slot, leading)
            if slot is None:
                continue
            count = self._take_blocks(seq, budget)
            if not count:
                self._adapters.unpin(seq.mix)
                break  # a smaller one must not overtake it again and again
            new_rows.append(self._admit(seq, slot))
            chunks.append(self._schedule(seq, count))
            budget -= count
            if self._leads(seq):
                leading.add(seq.arrival)
            for other in without_slot if seq.mix else ():
                other.num_overtaken += 1
        return new_rows

    def _slot_for(
        self, seq: Sequence, without_slot: list[Sequence], leading: set[int]
    ) -> int | None:
        """The pinned slot of a waiting sequence, or None if it must wait on.

        `without_slot` gathers those that found none. Once as many as can run have overtaken one of
        them, no other takes a slot before it, so that slots fall free.
        """
        if seq.index and seq.arrival in leading:  # the first answer computes what it will share
            return None
        if not self._adapters.ready(seq.mix):
            return None
        patient = all(other.num_overtaken < self._max_num_seqs for other in without_slot)
        slot = self._adapters.pin(seq.mix) if patient or not seq.mix else None
        if slot is None:
            without_slot.append(seq)
        return slot

    def _leads(self, seq: Sequence) -> bool:
        """Whether it still computes prompt blocks that the other answers to its request can use."""
        size = self._pool.block_size
        return (
            self._pool.enable_prefix_caching
            and seq.index == 0
            and seq.params.n > 1
            and seq.params.prompt_logprobs is None
            and seq.num_computed < (len(seq.prompt_ids) - 1) // size * size
        )

    def _make_room(self, seq: Sequence, count: int) -> None:
        """Preempts from the last arrival on until `seq` can grow, itself if it is the last."""
        while seq.row is not None and self._new_blocks(seq, count) > self._pool.num_free:
            last = max(self.running, key=by_arrival)
            assert not last.in_flight
            self._release(last)
            last.num_scheduled = last.num_computed = 0
            self.waiting.append(last)
            self.num_preemptions += 1

    def _take_blocks(self, seq: Sequence, budget: int) -> int:
        """Takes a waiting sequence's cached prefix; the size of its first chunk, 0 = no room."""
        cached = self._match(seq)
        self._pool.acquire(cached)
        start = len(cached) * self._pool.block_size
        count = min(seq.num_tokens - start, budget)
        if self._pool.blocks_for(start + count) - len(cached) > self._pool.num_free:
            self._pool.free(cached)
            return 0
        seq.blocks = cached
        seq.num_scheduled = seq.num_computed = start
        return count

    def _match(self, seq: Sequence) -> list[int]:
        if seq.params.prompt_logprobs is not None:  # they need the logits of the whole prompt
            return []
        limit = seq.num_tokens - 1  # one token must be computed, to have logits
        return self._pool.match(seq.tokens(0, limit), seq.identity, limit)

    def _admit(self, seq: Sequence, slot: int) -> NewSequence:
        """Moves a sequence that has its slot and its cached prefix from waiting to running."""
        if seq.seq_id not in self._keys:  # the first admission, not the return after a preemption
            self._keys[seq.seq_id] = []
            seq.num_cached = seq.num_computed
        seq.row = row = heapq.heappop(self._free_rows)
        self._slots[row] = slot
        self.waiting.remove(seq)
        self.running.append(seq)
        return NewSequence(
            row=row,
            token_ids=seq.tokens(0, seq.num_tokens),
            num_prompt=len(seq.prompt_ids),
            params=seq.params,
            seed=seq.seed,
            stop_ids=seq.stop_ids,
        )

    def _schedule(self, seq: Sequence, count: int) -> ScheduledChunk:
        """The next `count` tokens of a running sequence, for which there is room."""
        assert seq.row is not None
        seq.blocks += self._pool.allocate(self._new_blocks(seq, count))
        start = seq.num_scheduled
        end = start + count
        samples = end == seq.num_expected
        seq.num_scheduled, seq.num_pending = end, seq.num_pending + samples
        return ScheduledChunk(
            row=seq.row,
            start=start,
            count=count,
            slot=self._slots[seq.row],
            blocks=tuple(seq.blocks),
            samples=samples,
        )

    def _new_blocks(self, seq: Sequence, count: int) -> int:
        return self._pool.blocks_for(seq.num_scheduled + count) - len(seq.blocks)

    # Committing -----------------------------------------------------------------------------------

    def _advance(self, seq: Sequence, chunk: ScheduledChunk, row: ChunkResult) -> None:
        """Takes in what came of one chunk, and sets the finish reason if it was the last."""
        if row.failed:  # what it computed is not to be shared
            seq.finish_reason = FinishReason.ERROR
            return
        if self._pool.enable_prefix_caching:
            self._publish(seq, seq.num_computed - chunk.count)
        assert (row.token is not None) == chunk.samples, "a token where none is due, or none"
        if row.token is not None:
            seq.output_ids.append(row.token)
            self._check_end(seq, row.token)

    def _publish(self, seq: Sequence, start: int) -> None:
        """Publishes the blocks that became full when the tokens from `start` on were computed."""
        size, keys = self._pool.block_size, self._keys[seq.seq_id]
        full = seq.num_computed // size
        for i in range(len(keys), full):
            tokens = seq.tokens(i * size, (i + 1) * size)
            keys.append(block_key(keys[-1] if keys else ROOT_KEY, ((0, seq.identity),), tokens))
        for i in range(start // size, full):
            self._pool.publish(seq.blocks[i], keys[i])

    def _check_end(self, seq: Sequence, token: int) -> None:
        params, count = seq.params, len(seq.output_ids)
        if token in seq.stop_ids and count >= params.min_tokens:
            seq.finish_reason = FinishReason.STOP
            seq.stop_reason = token if token in params.stop_token_ids else None
        elif count == params.max_tokens or seq.num_tokens >= seq.max_total:
            seq.finish_reason = FinishReason.LENGTH

    def _retire(self, seq: Sequence) -> None:
        """Frees what a sequence that has ended holds."""
        self._release(seq)
        del self._keys[seq.seq_id]

    def _release(self, seq: Sequence) -> None:
        """Takes blocks, slot and row from a running sequence; published blocks stay cached."""
        assert seq.row is not None
        self.running.remove(seq)
        self._pool.free(seq.blocks)
        self._adapters.unpin(seq.mix)
        del self._slots[seq.row]
        heapq.heappush(self._free_rows, seq.row)
        self._left_rows.append(seq.row)
        seq.blocks, seq.row = [], None
