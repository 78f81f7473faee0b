"""A scheduler with its pool, on a runner that computes nothing and checks what it is told."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from multilora.adapters.mix import Mix, mix_identity
from multilora.config.engine import EngineConfig
from multilora.sampling_params import SamplingParams
from multilora.scheduling.block_pool import BlockPool
from multilora.scheduling.scheduler import Scheduler
from multilora.scheduling.scheduler_output import ChunkResult, SchedulerOutput, StepResult
from multilora.scheduling.sequence import Sequence

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

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

    def resident(self) -> Collection[Mix] | None:
        pinned = [mix for mix in self.table if self.pins[mix]]
        return self.table.keys() if len(pinned) == self.num_slots else None

    def unpin(self, mix: Mix) -> None:
        assert self.pins[mix] > 0
        self.pins[mix] -= 1


class House:
    """A scheduler, its pool and slots, and a runner that checks plans as the real one must trust.

    `content` is what the KV of each block position was computed for: (by whom, the tokens up to
    there). A block that is reused too early or shared wrongly shows as a difference.
    """

    def __init__(self, num_blocks: int = 64, num_slots: int = 8, **settings: Any) -> None:
        config = EngineConfig(model="none", block_size=4, num_kv_blocks=num_blocks, **settings)
        self.pool = BlockPool(num_blocks, 4, config.enable_prefix_caching)
        self.slots = FakeSlots(num_slots)
        self.scheduler = Scheduler(config, self.pool, self.slots, max_model_len=256)
        self.config = config
        self.rows: dict[int, list[int]] = {}  # as the runner knows them
        self.content: dict[tuple[int, int], tuple[tuple[bytes, int], tuple[int, ...]]] = {}
        self.count = 0

    def seq(
        self,
        prompt: list[int],
        mix: str = "",
        max_total: int = 256,
        adapter_start: int = 0,
        **kw: Any,
    ) -> Sequence:
        params = SamplingParams(**{"max_tokens": None, **kw})
        self.count += 1
        seq = Sequence(
            seq_id=self.count,
            request_id=f"r{self.count}",
            index=0,
            params=params,
            prompt_ids=prompt,
            mix=((mix, 1.0),) if mix else (),
            identity=mix_identity(((mix, 1.0),) if mix else ()),
            adapter_start=adapter_start,
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
        for row in plan.freed_request_slots:
            del self.rows[row]
        for new in plan.new_sequences:
            assert new.request_slot not in self.rows
            self.rows[new.request_slot] = list(new.token_ids)
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
            known = self.rows[chunk.request_slot]
            assert chunk.slot == (self.slots.table[seq.mix] if seq.mix else -1)
            for position in range(chunk.start, chunk.start + chunk.count):
                where = chunk.blocks[position // 4], position % 4
                self.content[where] = self.computed_by(seq, position), tuple(known[: position + 1])
            for position in range(chunk.start + chunk.count):  # what attention reads
                where = chunk.blocks[position // 4], position % 4
                wanted = self.computed_by(seq, position), tuple(known[: position + 1])
                assert self.content[where] == wanted
            assert chunk.samples == (chunk.start + chunk.count == len(known))
            new = token(seq) if chunk.samples else None
            if new is not None:
                known.append(new)
            scores = seq.params.prompt_logprobs is not None and chunk.start < len(seq.prompt_ids)
            results.append(
                ChunkResult(
                    chunk.request_slot,
                    new,
                    None,
                    [] if scores else None,
                    "failed" if chunk.request_slot == failed else None,
                )
            )
        return StepResult(tuple(results))

    @staticmethod
    def computed_by(seq: Sequence, position: int) -> tuple[bytes, int]:
        """Who computes a token: the base, or the mix that began at a place."""
        if position < seq.adapter_start:
            return mix_identity(()), 0
        return seq.identity, seq.adapter_start

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


def answer(plan: SchedulerOutput, token: int = 9) -> StepResult:
    """What a runner would say of a plan: the same token for every chunk that samples."""
    rows = (
        ChunkResult(c.request_slot, token if c.samples else None, None, None) for c in plan.chunks
    )
    return StepResult(tuple(rows))
