"""A plan as numbers: the tokens of a step in their order, and all that says where they belong."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

import multilora_kernels as mk

from ..device.input_buffer import InputField
from ..scheduling.scheduler_output import ScheduledChunk
from .request_slots import RequestSlot, RequestSlots

if TYPE_CHECKING:
    from ..adapters.store import AdapterStore

ROWS = 16
"""Row counts are padded to a multiple of this where rows are not independent: see ForwardBatch."""

_LONG, _INT = torch.int64, torch.int32


@dataclass(frozen=True, slots=True)
class BatchShape:
    """The sizes that a step is padded to."""

    tokens: int
    seqs: int
    logits: int  # rows of logits
    tiles: int
    head_tiles: int
    max_query_len: int
    max_seq_len: int


@dataclass(slots=True)
class ChunkLogits:
    """Which logits rows of the step belong to one chunk."""

    row: RequestSlot
    prompt_rows: range = range(0)  # rows of prompt positions whose next token is scored
    targets: list[int] = field(default_factory=list)  # those next tokens
    sample_row: int | None = None

    @property
    def samples(self) -> bool:
        """Whether the chunk gives a new token."""
        return self.sample_row is not None


@dataclass(slots=True)
class StepInputs:
    """One step, in the order of its computation: by slot, so that a slot's tokens are one run."""

    order: list[ScheduledChunk]
    sites: frozenset[str]  # that some row adapts
    block_table: np.ndarray  # int32 [seqs, blocks]
    shape: BatchShape  # its own sizes, padded to whole rows
    wanted: list[ChunkLogits]  # by chunk
    pages: int = 0  # rank pages that its widest slot has at one site
    ids: list[int] = field(default_factory=list)  # by token; 0 where only the device knows it
    token_rows: list[int] = field(default_factory=list)  # runner row to take it from there, or -1
    positions: list[int] = field(default_factory=list)
    kv_slots: list[int] = field(default_factory=list)
    query_starts: list[int] = field(default_factory=lambda: [0])
    seq_lens: list[int] = field(default_factory=list)
    logits_tokens: list[int] = field(default_factory=list)  # by logits row
    tiles: mk.Tiles | None = None  # on the host
    head_tiles: mk.Tiles | None = None

    @property
    def gives_all_logits(self) -> bool:
        """Whether the logits rows are those of all tokens, in their order."""
        return self.logits_tokens == list(range(len(self.ids)))

    @classmethod
    def empty(cls, shape: BatchShape) -> StepInputs:
        """A step of nothing, to be padded: it stores nothing and reads block 0 at most."""
        return cls([], frozenset(), np.zeros((0, 0), np.int32), shape, [])

    def fields(self, shape: BatchShape) -> dict[str, InputField]:
        """What goes to the device, padded to an shape that is large enough."""
        found = {
            "ids": InputField(self.ids, _LONG, (shape.tokens,)),
            "token_rows": InputField(self.token_rows, _LONG, (shape.tokens,), -1),
            "positions": InputField(self.positions, _LONG, (shape.tokens,)),
            "kv_slots": InputField(self.kv_slots, _LONG, (shape.tokens,), -1),
            "logits_rows": InputField(self.logits_tokens, _LONG, (shape.logits,)),
            # Sequences beyond the real ones have no rows and no tokens.
            "query_starts": InputField(
                self.query_starts, _INT, (shape.seqs + 1,), self.query_starts[-1]
            ),
            "seq_lens": InputField(self.seq_lens, _INT, (shape.seqs,)),
        }
        for name, tiles, size in (
            ("tiles", self.tiles, shape.tiles),
            ("head", self.head_tiles, shape.head_tiles),
        ):
            if tiles is not None or size:
                found |= _tile_fields(name, tiles or mk.make_tiles([], ROWS), size)
        return found


def lay_out(
    chunks: tuple[ScheduledChunk, ...],
    rows: RequestSlots,
    store: AdapterStore,
    size: int,
    multiple: int = ROWS,
) -> StepInputs:
    """The step of these chunks, with blocks of `size` tokens, rows padded to a `multiple`."""
    order = sorted(chunks, key=lambda chunk: (chunk.slot, chunk.row))
    seq_lens = [chunk.start + chunk.count for chunk in order]
    slots = [chunk.slot for chunk in order for _ in range(chunk.count)]
    wanted, logits_tokens, logits_slots = _wanted(order, rows)
    sites = store.active_sites(set(slots))
    one_each = all(chunk.count == 1 for chunk in order)
    tile = mk.DECODE_TILE if one_each or len(slots) <= ROWS * 4 else mk.PREFILL_TILE
    tiles = mk.make_tiles(slots, tile) if sites else None
    head = mk.make_tiles(logits_slots, mk.DECODE_TILE) if "lm_head" in sites else None
    shape = BatchShape(
        tokens=-(-len(slots) // multiple) * multiple,
        seqs=len(order),
        logits=-(-len(logits_tokens) // multiple) * multiple,
        tiles=0 if tiles is None else len(tiles.slots),
        head_tiles=0 if head is None else len(head.slots),
        max_query_len=max(chunk.count for chunk in order),
        max_seq_len=max(seq_lens),
    )
    table = rows.block_table(order, -(-shape.max_seq_len // size))
    step = StepInputs(order, sites, table, shape, wanted, store.most_pages(set(slots)))
    step.seq_lens, step.logits_tokens = seq_lens, logits_tokens
    step.tiles, step.head_tiles = tiles, head
    for chunk in order:
        _add_tokens(step, chunk, rows[chunk.row], size)
    return step


def _add_tokens(step: StepInputs, chunk: ScheduledChunk, row: RequestSlot, size: int) -> None:
    known = row.tokens(chunk.start, chunk.count)
    unknown = chunk.count - len(known)
    assert unknown <= 1, "only the last token may be unknown"
    span = range(chunk.start, chunk.start + chunk.count)
    step.ids += known + [0] * unknown
    step.token_rows += [-1] * len(known) + [chunk.row] * unknown
    step.positions += span
    step.kv_slots += [chunk.blocks[p // size] * size + p % size for p in span]
    step.query_starts.append(len(step.ids))


def _wanted(
    order: list[ScheduledChunk], rows: RequestSlots
) -> tuple[list[ChunkLogits], list[int], list[int]]:
    """For each chunk its logits rows; for each logits row its token and slot."""
    found: list[ChunkLogits] = []
    tokens: list[int] = []
    slots: list[int] = []
    first = 0
    for chunk in order:
        row = rows[chunk.row]
        prompt, wanted = row.sampling.prompt_ids, ChunkLogits(row)
        if row.sampling.params.prompt_logprobs is not None:
            last = min(chunk.start + chunk.count, len(prompt) - 1)
            count = max(last - chunk.start, 0)
            wanted.prompt_rows = range(len(tokens), len(tokens) + count)
            wanted.targets = prompt[chunk.start + 1 : chunk.start + 1 + count]
            tokens += range(first, first + count)
        if chunk.samples:
            wanted.sample_row = len(tokens)
            tokens.append(first + chunk.count - 1)
        slots += [chunk.slot] * (len(tokens) - len(slots))
        found.append(wanted)
        first += chunk.count
    return found, tokens, slots


def _tile_fields(name: str, tiles: mk.Tiles, size: int) -> dict[str, InputField]:
    return {
        f"{name}.slots": InputField(tiles.slots.numpy(), _INT, (size,), -1),
        f"{name}.starts": InputField(tiles.starts.numpy(), _INT, (size,)),
        f"{name}.lens": InputField(tiles.lens.numpy(), _INT, (size,)),
        f"{name}.num_tiles": InputField(tiles.num_tiles.numpy(), _INT, (1,)),
    }
