"""What the runner knows of the sequences in its request slots: tokens, blocks, how to sample."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ..sampling.logits_processors import logits_processors
from ..sampling.sampler import SampledToken, SamplingRows, SamplingState
from ..scheduling.scheduler_output import NewSequence, SchedulerOutput


class RequestSlots:
    """All request slots, as columns: a step of many rows is laid out in a few array operations.

    A slot that a step in flight computes is not given to another sequence.
    """

    def __init__(
        self, count: int, max_model_len: int, block_size: int, vocab: int, device: torch.device
    ) -> None:
        self._block_size, self._vocab, self._device = block_size, vocab, device
        # Memory that is never touched is never taken: most sequences are short.
        self._tokens = np.zeros((count, max_model_len), np.int32)  # prompt and output
        self._blocks = np.zeros((count, -(-max_model_len // block_size)), np.int32)
        self._num_prompt = np.zeros(count, np.int64)
        self._num_tokens = np.zeros(count, np.int64)  # whose values are on the host
        self._num_scored = np.zeros(count, np.int64)  # first positions whose next token is scored
        self._num_blocks = [0] * count
        self._states: dict[int, SamplingState] = {}

    def __getitem__(self, request_slot: int) -> SamplingState:
        return self._states[request_slot]

    @property
    def known(self) -> frozenset[int]:
        """The slots that have a sequence."""
        return frozenset(self._states)

    def reset(self) -> None:
        """Forgets every sequence."""
        self._states.clear()

    def take(self, output: SchedulerOutput) -> None:
        """Frees and fills slots as the scheduler says, and notes the blocks of its chunks."""
        for freed in output.freed_request_slots:
            self._states.pop(freed, None)
        for new in output.new_sequences:
            self._fill(new)
        for chunk in output.chunks:
            slot, blocks = chunk.request_slot, chunk.blocks
            known = self._num_blocks[slot]
            if len(blocks) > known:
                self._blocks[slot, known : len(blocks)] = blocks[known:]
                self._num_blocks[slot] = len(blocks)

    def _fill(self, new: NewSequence) -> None:
        slot, ids, cut = new.request_slot, new.token_ids, new.num_prompt
        self._tokens[slot, : len(ids)] = ids
        self._num_prompt[slot], self._num_tokens[slot] = cut, len(ids)
        self._num_scored[slot] = cut - 1 if new.params.prompt_logprobs is not None else 0
        self._num_blocks[slot] = 0
        processors = logits_processors(
            new.params,
            ids[:cut],
            ids[cut:],
            new.stop_ids,
            self._vocab,
            self._device,
            bad_words=new.bad_words,
        )
        self._states[slot] = SamplingState(new.params, new.seed, processors)

    def append(self, rows: SamplingRows, sampled: Sequence[SampledToken]) -> None:
        """Takes in the tokens of a step; a sequence whose token is an error gets none."""
        has_token = np.array([result.token is not None for result in sampled], bool)
        slots = rows.request_slots[has_token]
        positions = self._num_prompt[slots] + rows.positions[has_token]
        self._tokens[slots, positions] = [s.token for s in sampled if s.token is not None]
        self._num_tokens[slots] = positions + 1

    def sampling_rows(self, slots: np.ndarray, lengths: np.ndarray) -> SamplingRows:
        """The rows of logits that give the tokens after the first `lengths` of these sequences."""
        states = [self._states[slot] for slot in slots.tolist()]
        return SamplingRows(states, slots, lengths - self._num_prompt[slots])

    def tokens(self, slots: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Token ids at these places, int64, and whether the host knows them; unknown ones are 0."""
        is_known = positions < self._num_tokens[slots]
        return np.where(is_known, self._tokens[slots, positions], 0), is_known

    def kv_slots(self, slots: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Where the keys and values of these tokens go, int64."""
        blocks = self._blocks[slots, positions // self._block_size].astype(np.int64)
        found: np.ndarray = blocks * self._block_size + positions % self._block_size
        return found

    def num_scored(self, slots: np.ndarray) -> np.ndarray:
        """Of each sequence how many positions, from its first on, have a token to be scored."""
        found: np.ndarray = self._num_scored[slots]
        return found

    def block_table(self, slots: np.ndarray, length: int) -> np.ndarray:
        """int32 [slots, blocks]: the blocks of each sequence's first `length` tokens."""
        return self._blocks[slots, : -(-length // self._block_size)]
