"""A step's tensors against what each token, sequence and row of logits says one by one."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

import multilora_kernels as mk
from multilora.runtime.step_inputs import BatchShape, StepInputs, lay_out
from multilora.scheduling.scheduler_output import ScheduledChunk, SchedulerOutput
from tests.harness.request_slots import (
    SIZE,
    SLOTS,
    VOCAB,
    FakeStore,
    new_sequence,
    new_slots,
)


class Case:
    """Random sequences with some tokens computed, and a chunk of each."""

    def __init__(self, seed: int) -> None:
        draw = random.Random(seed)
        self.slots, self.sequences = new_slots(), {}
        one_each = draw.random() < 0.3
        chunks = []
        blocks = iter(draw.sample(range(10_000), 10_000))
        for slot in draw.sample(range(SLOTS), draw.randint(1, SLOTS)):
            ids = [draw.randrange(VOCAB) for _ in range(draw.randint(2, 40))]
            new = new_sequence(
                slot,
                ids,
                draw.randint(1, len(ids)),
                prompt_logprobs=draw.choice((None, None, 2)),
            )
            # The last token may be one that only the device knows.
            end = draw.randint(1, len(ids) + (new.num_prompt < len(ids)))
            start = end - 1 if one_each else draw.randrange(end)
            start = min(start, len(ids))
            self.sequences[slot] = new
            held = tuple(next(blocks) for _ in range(-(-end // SIZE)))
            chunks.append(
                ScheduledChunk(
                    request_slot=slot,
                    start=start,
                    count=end - start,
                    slot=draw.choice((-1, 0, 1, 2)),
                    blocks=held,
                    samples=end >= len(ids),
                    adapter_start=draw.choice((0, 0, draw.randint(0, 40))),
                )
            )
        self.plan = SchedulerOutput(tuple(self.sequences.values()), tuple(chunks), ())
        self.slots.take(self.plan)
        self.step = lay_out(self.plan.chunks, self.slots, FakeStore(), multiple=1)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(40))
def test_every_token_and_row_is_where_it_belongs(seed: int) -> None:
    case = Case(seed)
    step, t = case.step, case.step.tensors
    in_order = sorted(case.plan.chunks, key=lambda c: (c.first_slot, c.request_slot))
    assert list(step.chunks) == in_order
    tokens, logits, sampled, scored = [], [], [], []
    for chunk, count in zip(step.chunks, step.num_scored, strict=True):
        new, positions = (
            case.sequences[chunk.request_slot],
            range(chunk.start, chunk.start + chunk.count),
        )
        scores = 0
        for position in positions:
            is_known = position < len(new.token_ids)
            token = new.token_ids[position] if is_known else 0
            block = chunk.blocks[position // SIZE]
            wants = new.params.prompt_logprobs is not None and position + 1 < new.num_prompt
            if wants:
                scored.append((len(logits), new.token_ids[position + 1]))
                scores += 1
            is_last = position == positions[-1] and chunk.samples
            if is_last:
                sampled.append((len(logits), chunk.request_slot, position + 1 - new.num_prompt))
            if wants or is_last:
                logits.append(len(tokens))
            slot = -1 if is_known else chunk.request_slot
            adapter = chunk.slot if position >= chunk.adapter_start else -1
            tokens.append((token, slot, position, block * SIZE + position % SIZE, adapter))
        assert count == scores
    ids, slots, positions, kv_slots, adapters = map(list, zip(*tokens, strict=True))
    assert t.token_ids.tolist() == ids
    assert t.token_request_slots.tolist() == slots
    assert t.positions.tolist() == positions
    assert t.kv_slots.tolist() == kv_slots
    assert t.logits_tokens.tolist() == logits
    assert step.gives_all_logits == (logits == list(range(len(ids))))
    check_rows(step, sampled, scored)
    check_sequences(step)
    check_tiles(step, adapters, [adapters[token] for token in logits])


def check_rows(
    step: StepInputs, sampled: list[tuple[int, int, int]], scored: list[tuple[int, int]]
) -> None:
    t = step.tensors
    pairs = zip(step.rows.request_slots.tolist(), step.rows.positions.tolist(), strict=True)
    assert list(pairs) == [s[1:] for s in sampled]
    rows = range(len(sampled)) if t.sampled_rows is None else t.sampled_rows.tolist()
    assert list(rows) == [s[0] for s in sampled]
    if not scored:
        assert t.scored_rows is None
        assert t.scored_ids is None
        return
    assert t.scored_rows is not None
    assert t.scored_ids is not None
    assert list(zip(t.scored_rows.tolist(), t.scored_ids.tolist(), strict=True)) == scored


def check_sequences(step: StepInputs) -> None:
    t, counts = step.tensors, [chunk.count for chunk in step.chunks]
    assert t.query_starts.tolist() == [0, *np.cumsum(counts).tolist()]
    lens = [chunk.start + chunk.count for chunk in step.chunks]
    assert t.seq_lens.tolist() == lens
    for chunk, row, length in zip(step.chunks, t.block_table.tolist(), lens, strict=True):
        assert row[: -(-length // SIZE)] == list(chunk.blocks)
    assert (step.shape.max_query_len, step.shape.max_seq_len) == (max(counts), max(lens))
    assert (step.shape.tokens, step.shape.seqs) == (sum(counts), len(counts))


def check_tiles(step: StepInputs, adapters: list[int], of_logits: list[int]) -> None:
    t = step.tensors
    assert (t.tiles is None) == (max(adapters) < 0)
    size = mk.DECODE_TILE if len(adapters) <= 64 else mk.PREFILL_TILE
    for tiles, slots, most in (
        (t.tiles, adapters, size),
        (t.head_tiles, of_logits, mk.DECODE_TILE),
    ):
        if tiles is not None:
            assert all(map(torch.equal, tiles, mk.make_tiles(slots, most)))
    assert (t.head_tiles is not None) == (1 in adapters)
    assert (t.token_slots is None) == (max(adapters) < 0)
    assert t.token_slots is None or t.token_slots.tolist() == adapters
    assert step.shape.tiles == (0 if t.tiles is None else len(t.tiles.slots))


def test_long_prompts_have_large_tiles() -> None:
    slots = new_slots()
    news = tuple(new_sequence(i, [1] * 40, 40) for i in range(2))
    chunks = tuple(ScheduledChunk(i, 0, 40, 0, tuple(range(10)), True) for i in range(2))
    slots.take(SchedulerOutput(news, chunks, ()))
    tiles = lay_out(chunks, slots, FakeStore()).tensors.tiles  # type: ignore[arg-type]
    assert tiles is not None
    assert tiles.lens.tolist() == [64, 16]


@pytest.mark.parametrize("seed", range(8))
def test_padding_stores_nothing_and_belongs_to_nobody(seed: int) -> None:
    step = Case(seed).step
    own, shape = step.tensors, BatchShape(600, 40, 600, 64, 8, 64, 64)
    sent = step.padded(shape)
    count, seqs = step.shape.tokens, step.shape.seqs
    for name, fill in (
        ("token_ids", 0),
        ("token_request_slots", -1),
        ("positions", 0),
        ("kv_slots", -1),
    ):
        found = getattr(sent, name)
        assert torch.equal(found[:count], getattr(own, name))
        assert found[count:].tolist() == [fill] * (600 - count)
    assert sent.query_starts[seqs + 1 :].tolist() == [count] * (40 - seqs)
    assert sent.seq_lens[seqs:].tolist() == [0] * (40 - seqs)
    assert sent.tiles is not None
    assert sent.tiles.slots[step.shape.tiles :].unique().tolist() == [-1]
    assert int(sent.tiles.num_tiles) == step.shape.tiles
    assert own.tiles is None or torch.equal(sent.tiles.slots[: step.shape.tiles], own.tiles.slots)
    if own.token_slots is not None:
        assert sent.token_slots is not None
        assert sent.token_slots.tolist() == own.token_slots.tolist() + [-1] * (600 - count)


def test_an_empty_step_has_only_padding() -> None:
    shape = BatchShape(16, 16, 16, 3, 0, 1, 64)
    sent = StepInputs.empty(shape).padded(shape)
    assert sent.kv_slots.tolist() == [-1] * 16
    assert sent.query_starts.tolist() == [0] * 17
    assert sent.seq_lens.tolist() == [0] * 16
    assert sent.tiles is not None
    assert sent.tiles.slots.tolist() == [-1] * 3
    assert sent.head_tiles is None
    assert sent.token_slots is None
    sent = StepInputs.empty(shape, has_token_slots=True).padded(shape)
    assert sent.token_slots is not None
    assert sent.token_slots.tolist() == [-1] * 16
