"""A step as arrays: its tokens in their order, and all that says where they belong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

import multilora_kernels as mk

from ..sampling.sampler import SamplingRows, SamplingTensors
from ..scheduling.scheduler_output import ScheduledChunk
from .request_slots import RequestSlots

if TYPE_CHECKING:
    from ..adapters.store import AdapterStore

_NONE = np.zeros(0, np.int64)

ROWS = 16
"""Row counts are padded to a multiple of this where rows are not independent: see ForwardBatch."""


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


class StepTensors(NamedTuple):
    """A step as it is sent: on the host, and then on the device.

    What a captured graph reads comes first, so that it lies at the same place in every step of the
    same BatchShape; what changes its size most often comes last.
    """

    token_ids: Tensor  # int64 [tokens], 0 where only the device knows it
    token_request_slots: Tensor  # int64 [tokens], the request slot whose last token it is, or -1
    positions: Tensor  # int64 [tokens]
    kv_slots: Tensor  # int64 [tokens], -1 for padding
    logits_tokens: Tensor  # int64 [logits], the token of each row of logits
    query_starts: Tensor  # int32 [seqs + 1]
    seq_lens: Tensor  # int32 [seqs]
    tiles: mk.Tiles | None = None
    head_tiles: mk.Tiles | None = None  # of the rows of logits
    token_slots: Tensor | None = None  # int32 [tokens], adapter slots, where anything asks for them
    sampled_rows: Tensor | None = None  # int64, rows of logits that give a token; None = the first
    sampling: SamplingTensors | None = None  # what the sampler asked for
    scored_rows: Tensor | None = None  # int64, rows of logits that score a prompt token
    scored_ids: Tensor | None = None  # int64, those tokens
    block_table: Tensor = torch.zeros(0, 0, dtype=torch.int32)  # int32 [seqs, blocks]


@dataclass(frozen=True, slots=True)
class StepInputs:
    """One step, in the order of its computation: by slot, so that a slot's tokens are one run."""

    shape: BatchShape  # its own sizes, padded to whole rows
    chunks: Sequence[ScheduledChunk]
    sites: frozenset[str]  # that some row adapts
    rows: SamplingRows  # that give a token, in the order of the chunks
    num_scored: Sequence[int]  # prompt tokens that each chunk scores
    prompt_logprobs: Sequence[int | None]  # how many each chunk's request wants to know
    tensors: StepTensors  # on the host, not padded; what the sampler wants is not yet there
    pages: int = 0  # rank pages that its widest slot has at one site

    @property
    def gives_all_logits(self) -> bool:
        """Whether the rows of logits are those of all tokens, in their order."""
        return len(self.tensors.logits_tokens) == len(self.tensors.token_ids)

    @classmethod
    def empty(cls, shape: BatchShape, *, has_token_slots: bool = False) -> StepInputs:
        """A step of nothing, to be padded: it stores nothing and reads block 0 at most."""
        tensors = StepTensors(
            token_ids=_int64(_NONE),
            token_request_slots=_int64(_NONE),
            positions=_int64(_NONE),
            kv_slots=_int64(_NONE),
            logits_tokens=_int64(_NONE),
            query_starts=_int32(np.zeros(1)),
            seq_lens=_int32(_NONE),
            token_slots=_int32(_NONE) if has_token_slots else None,
        )
        rows = SamplingRows((), _NONE, _NONE)
        return cls(shape, (), frozenset(), rows, (), (), tensors)

    def padded(self, shape: BatchShape, sampling: SamplingTensors | None = None) -> StepTensors:
        """What is sent: padded to a shape that is large enough."""
        t = self.tensors
        return t._replace(
            token_ids=_padded(t.token_ids, shape.tokens),
            token_request_slots=_padded(t.token_request_slots, shape.tokens, -1),
            positions=_padded(t.positions, shape.tokens),
            kv_slots=_padded(t.kv_slots, shape.tokens, -1),
            logits_tokens=_padded(t.logits_tokens, shape.logits),
            # Sequences beyond the real ones have no rows and no tokens.
            query_starts=_padded(t.query_starts, shape.seqs + 1, len(t.token_ids)),
            seq_lens=_padded(t.seq_lens, shape.seqs),
            tiles=_padded_tiles(t.tiles, shape.tiles),
            head_tiles=_padded_tiles(t.head_tiles, shape.head_tiles),
            token_slots=None if t.token_slots is None else _padded(t.token_slots, shape.tokens, -1),
            sampling=sampling,
        )


def lay_out(
    chunks: Sequence[ScheduledChunk],
    request_slots: RequestSlots,
    store: AdapterStore,
    multiple: int = ROWS,
) -> StepInputs:
    """The step of these chunks, its rows padded to a `multiple`."""
    order = sorted(chunks, key=lambda chunk: (chunk.first_slot, chunk.request_slot))
    rows = [(c.request_slot, c.start, c.count, c.samples, c.slot, c.adapter_start) for c in order]
    slots, starts, counts, samples, adapter_slots, begins = np.array(rows, np.int64).T
    samples = samples.astype(bool)
    seq_lens, ends = starts + counts, counts.cumsum()
    # Of each token its chunk and its place in there, then its request slot and position.
    chunk = np.arange(len(order)).repeat(counts)
    place = np.arange(len(chunk)) - (ends - counts)[chunk]
    token_slots, positions = slots[chunk], starts[chunk] + place
    ids, is_known = request_slots.tokens(token_slots, positions)
    num_scored = np.maximum(np.minimum(request_slots.num_scored(slots), seq_lens) - starts, 0)
    is_scored = place < num_scored[chunk]
    gives_logits = is_scored.copy()
    gives_logits[ends[samples] - 1] = True
    logits_tokens = gives_logits.nonzero()[0]
    tensors = StepTensors(
        token_ids=_int64(ids),
        token_request_slots=_int64(np.where(is_known, -1, token_slots)),
        positions=_int64(positions),
        kv_slots=_int64(request_slots.kv_slots(token_slots, positions)),
        logits_tokens=_int64(logits_tokens),
        query_starts=_int32(np.concatenate(([0], ends))),
        seq_lens=_int32(seq_lens),
        block_table=_int32(request_slots.block_table(slots, int(seq_lens.max()))),
    )
    if is_scored.any():
        next_ids, _ = request_slots.tokens(token_slots[is_scored], positions[is_scored] + 1)
        tensors = _with_scores(tensors, is_scored[logits_tokens], next_ids)
    token_adapters = adapter_slots[chunk]
    active = adapter_slots.tolist()
    if (begins > starts).any():  # the first tokens of some are the base's
        token_adapters[positions < begins[chunk]] = -1
        active = np.unique(token_adapters).tolist()
    sites = store.active_sites(active)
    if sites:
        tensors = _with_adapters(tensors, sites, token_adapters, len(order), store)
    shape = _shape(tensors, int(counts.max()), int(seq_lens.max()), multiple)
    sampled = request_slots.sampling_rows(slots[samples], seq_lens[samples])
    tops = [request_slots[c.request_slot].params.num_prompt_logprobs for c in order]
    pages = store.most_pages(active)
    return StepInputs(shape, order, sites, sampled, num_scored.tolist(), tops, tensors, pages)


def _with_scores(tensors: StepTensors, is_scored: np.ndarray, next_ids: np.ndarray) -> StepTensors:
    """With what scores prompts; `is_scored` is by row of logits."""
    return tensors._replace(
        sampled_rows=_int64((~is_scored).nonzero()[0]),
        scored_rows=_int64(is_scored.nonzero()[0]),
        scored_ids=_int64(next_ids),
    )


def _with_adapters(
    tensors: StepTensors,
    sites: frozenset[str],
    token_adapters: np.ndarray,
    num_chunks: int,
    store: AdapterStore,
) -> StepTensors:
    """With the work of LoRA at these sites; `token_adapters` are the adapter slots of tokens."""
    if store.needs_token_slots:
        tensors = tensors._replace(token_slots=_int32(token_adapters))
    count = len(token_adapters)
    is_small = count == num_chunks or count <= ROWS * 4
    tile = mk.DECODE_TILE if is_small else mk.PREFILL_TILE
    tensors = tensors._replace(tiles=mk.make_tiles(token_adapters.tolist(), tile))
    if "lm_head" not in sites:
        return tensors
    of_logits = token_adapters[tensors.logits_tokens.numpy()].tolist()
    return tensors._replace(head_tiles=mk.make_tiles(of_logits, mk.DECODE_TILE))


def _shape(tensors: StepTensors, max_query_len: int, max_seq_len: int, multiple: int) -> BatchShape:
    """The sizes of a step, its rows padded to a `multiple`."""
    return BatchShape(
        tokens=-(-len(tensors.token_ids) // multiple) * multiple,
        seqs=len(tensors.seq_lens),
        logits=-(-len(tensors.logits_tokens) // multiple) * multiple,
        tiles=0 if tensors.tiles is None else len(tensors.tiles.slots),
        head_tiles=0 if tensors.head_tiles is None else len(tensors.head_tiles.slots),
        max_query_len=max_query_len,
        max_seq_len=max_seq_len,
    )


def _int64(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values.astype(np.int64, copy=False))


def _int32(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values.astype(np.int32, copy=False))


def _padded(values: Tensor, size: int, fill: int = 0) -> Tensor:
    if len(values) == size:
        return values
    found = values.new_full((size,), fill)
    found[: len(values)] = values
    return found


def _padded_tiles(tiles: mk.Tiles | None, size: int) -> mk.Tiles | None:
    if tiles is None and not size:
        return None
    slots, starts, lens, num_tiles = tiles or mk.make_tiles([], mk.DECODE_TILE)
    return mk.Tiles(_padded(slots, size, -1), _padded(starts, size), _padded(lens, size), num_tiles)
