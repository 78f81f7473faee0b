"""Carries out plans: builds batches, runs the model, samples. `submit` starts, `collect` waits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

import multilora_kernels as mk

from .adapters.store import AdapterStore
from .batch import ForwardBatch, SiteLora
from .kv_cache import KVCache
from .models.llama import Llama
from .plan import Chunk, NewRow, Plan, RowResult, StepResult
from .request import SamplingParams
from .sampler import Sampled, SampleRow, sample, token_logprobs
from .sites import Site

ROWS = 16
"""Row counts are padded to a multiple of this: see ForwardBatch."""


@dataclass(slots=True)
class _Row:
    """What the runner knows of a sequence: enough to make its inputs and to sample for it."""

    prompt_ids: list[int]
    output_ids: list[int]
    params: SamplingParams
    seed: int
    stop_ids: frozenset[int]

    @classmethod
    def of(cls, new: NewRow) -> _Row:
        ids, cut = new.token_ids, new.num_prompt
        return cls(ids[:cut], ids[cut:], new.params, new.seed, new.stop_ids)

    def tokens(self, start: int, count: int) -> list[int]:
        cut, end = len(self.prompt_ids), start + count
        if end <= cut:
            return self.prompt_ids[start:end]
        return self.prompt_ids[start:cut] + self.output_ids[max(start - cut, 0) : end - cut]


@dataclass(slots=True)
class _Wanted:
    """Which logits rows of the step belong to one chunk."""

    prompt_rows: range = range(0)  # rows of prompt positions whose next token is scored
    targets: list[int] = field(default_factory=list)  # those next tokens
    sample_row: int | None = None


@dataclass(frozen=True, slots=True)
class Ticket:
    """A step on its way."""

    plan: Plan
    order: list[Chunk]
    wanted: list[_Wanted]
    logits: Tensor  # [padded rows, vocab]


class Runner:
    """The compute side of the engine: one model, one KV cache, the adapters' device pages."""

    def __init__(
        self,
        model: Llama,
        cache: KVCache,
        store: AdapterStore,
        sites: Mapping[str, Site],
        block_size: int,
    ) -> None:
        self.model, self.cache, self.store = model, cache, store
        self.sites, self.block_size = sites, block_size
        self.rows: dict[int, _Row] = {}

    @torch.inference_mode()
    def submit(self, plan: Plan) -> Ticket:
        """Starts a step. Chunks are laid out by slot, so that a slot's tokens lie together."""
        for row in plan.freed_rows:
            self.rows.pop(row, None)
        for new in plan.new_rows:
            self.rows[new.row] = _Row.of(new)
        order = sorted(plan.chunks, key=lambda chunk: (chunk.slot, chunk.row))
        wanted, logits_tokens, logits_slots = self._wanted(order)
        batch = self._batch(order, logits_tokens, logits_slots)
        return Ticket(plan, order, wanted, self.model(batch, self.cache))

    @torch.inference_mode()
    def collect(self, ticket: Ticket) -> StepResult:
        """Waits for a step and samples its new tokens."""
        samplers = [
            (w.sample_row, self._sample_row(c))
            for c, w in zip(ticket.order, ticket.wanted, strict=True)
            if w.sample_row is not None
        ]
        rows = torch.tensor(
            [row for row, _ in samplers] + [0] * (-len(samplers) % ROWS), dtype=torch.int64
        )
        drawn = iter(sample(ticket.logits[rows], [row for _, row in samplers]) if samplers else ())
        results = {}
        for chunk, wanted in zip(ticket.order, ticket.wanted, strict=True):
            sampled = next(drawn) if wanted.sample_row is not None else None
            results[chunk.row] = self._result(chunk, wanted, sampled, ticket.logits)
        return StepResult(tuple(results[chunk.row] for chunk in ticket.plan.chunks))

    def _sample_row(self, chunk: Chunk) -> SampleRow:
        row = self.rows[chunk.row]
        return SampleRow(row.params, row.seed, row.prompt_ids, row.output_ids, row.stop_ids)

    def _result(
        self, chunk: Chunk, wanted: _Wanted, sampled: Sampled | None, logits: Tensor
    ) -> RowResult:
        row = self.rows[chunk.row]
        prompt_logprobs = None
        if row.params.prompt_logprobs is not None:
            padded = _padded(list(wanted.prompt_rows), 0)
            scored = logits[torch.tensor(padded, dtype=torch.int64)]
            prompt_logprobs = token_logprobs(scored, wanted.targets, row.params.prompt_logprobs)
        if sampled is None:
            return RowResult(chunk.row, None, None, prompt_logprobs)
        row.output_ids.append(sampled.token)
        return RowResult(
            chunk.row, sampled.token, sampled.logprobs, prompt_logprobs, sampled.failed
        )

    def _wanted(self, order: list[Chunk]) -> tuple[list[_Wanted], list[int], list[int]]:
        """For each chunk its logits rows; for each logits row its token and slot."""
        found: list[_Wanted] = []
        tokens: list[int] = []
        slots: list[int] = []
        first = 0
        for chunk in order:
            row, wanted = self.rows[chunk.row], _Wanted()
            if row.params.prompt_logprobs is not None:
                last = min(chunk.start + chunk.count, len(row.prompt_ids) - 1)
                count = max(last - chunk.start, 0)
                wanted.prompt_rows = range(len(tokens), len(tokens) + count)
                wanted.targets = row.prompt_ids[chunk.start + 1 : chunk.start + 1 + count]
                tokens += range(first, first + count)
            if chunk.samples:
                wanted.sample_row = len(tokens)
                tokens.append(first + chunk.count - 1)
            slots += [chunk.slot] * (len(tokens) - len(slots))
            found.append(wanted)
            first += chunk.count
        return found, _padded(tokens, 0), _padded(slots, -1)

    def _batch(
        self, order: list[Chunk], logits_tokens: list[int], logits_slots: list[int]
    ) -> ForwardBatch:
        ids: list[int] = []
        positions: list[int] = []
        kv_slots: list[int] = []
        slots: list[int] = []
        starts = [0]
        size = self.block_size
        for chunk in order:
            ids += self.rows[chunk.row].tokens(chunk.start, chunk.count)
            span = range(chunk.start, chunk.start + chunk.count)
            positions += span
            kv_slots += [chunk.blocks[p // size] * size + p % size for p in span]
            slots += [chunk.slot] * chunk.count
            starts.append(len(ids))
        seq_lens = [chunk.start + chunk.count for chunk in order]
        width = max(-(-length // size) for length in seq_lens)
        table = [list(c.blocks[:width]) + [0] * (width - len(c.blocks)) for c in order]
        return ForwardBatch(
            ids=torch.tensor(_padded(ids, 0)),
            positions=torch.tensor(_padded(positions, 0)),
            kv_slots=torch.tensor(_padded(kv_slots, -1)),
            query_starts=torch.tensor(starts, dtype=torch.int32),
            seq_lens=torch.tensor(seq_lens, dtype=torch.int32),
            block_table=torch.tensor(table, dtype=torch.int32),
            max_query_len=max(chunk.count for chunk in order),
            max_seq_len=max(seq_lens),
            logits_rows=torch.tensor(logits_tokens, dtype=torch.int64),
            lora=self._lora(_padded(slots, -1), logits_slots),
        )

    def _lora(self, token_slots: list[int], logits_slots: list[int]) -> dict[str, SiteLora]:
        active = self.store.active_sites(set(token_slots))
        if not active:
            return {}
        tile = mk.DECODE_TILE if len(token_slots) <= ROWS * 4 else mk.PREFILL_TILE
        tiles = mk.make_tiles(token_slots, tile)
        head = mk.make_tiles(logits_slots, mk.DECODE_TILE) if "lm_head" in active else tiles
        found = {}
        for name in active:
            found[name] = SiteLora(
                self.store.pool(name),
                self.store.table.site(name),
                head if name == "lm_head" else tiles,
                self.sites[name].slice_starts,
            )
        return found


def _padded(values: list[int], fill: int) -> list[int]:
    return values + [fill] * (-len(values) % ROWS)
