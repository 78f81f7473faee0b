"""What the runner knows of the sequences in its rows, on the host and on the device."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ..device.cpu import Device
from ..sampling.device import Adjuster
from ..sampling.host import SampleRow
from ..scheduling.scheduler_output import NewSequence, ScheduledChunk, SchedulerOutput


@dataclass(slots=True)
class RequestSlot:
    """One sequence: enough to make its inputs and to sample for it."""

    sampling: SampleRow  # its outputs lag behind `num_sampled` while steps are on their way
    num_sampled: int  # output tokens sampled or being sampled
    num_choices: int = 0  # of those, in this row
    num_blocks: int = 0  # known to the block table
    adjuster: Adjuster | None = None  # what changes its logits, when it is sampled on the device

    @classmethod
    def of(cls, new: NewSequence) -> RequestSlot:
        """From the plan that brings the sequence."""
        ids, cut = new.token_ids, new.num_prompt
        sampling = SampleRow(new.params, new.seed, ids[:cut], ids[cut:], new.stop_ids)
        return cls(sampling, len(ids) - cut)

    def tokens(self, start: int, count: int) -> list[int]:
        """Tokens of prompt + output from `start` on, as far as their values are on the host."""
        prompt, output = self.sampling.prompt_ids, self.sampling.output_ids
        cut, end = len(prompt), start + count
        if end <= cut:
            return prompt[start:end]
        return prompt[start:cut] + output[max(start - cut, 0) : end - cut]


class RequestSlots:
    """All rows, the last sampled token of each on the device, and their blocks."""

    def __init__(self, count: int, max_blocks: int, device: Device) -> None:
        self.last_tokens = torch.zeros(count, dtype=torch.int64, device=device.torch)
        self._rows: dict[int, RequestSlot] = {}
        self._blocks = np.zeros((count, max_blocks), dtype=np.int32)

    def __getitem__(self, row: int) -> RequestSlot:
        return self._rows[row]

    @property
    def known(self) -> frozenset[int]:
        """The rows that have a sequence."""
        return frozenset(self._rows)

    def clear(self) -> None:
        """Frees all rows."""
        self._rows.clear()

    def take(self, plan: SchedulerOutput) -> None:
        """Frees and fills rows as the plan says, and notes the blocks of its chunks."""
        for freed in plan.freed_rows:
            self._rows.pop(freed, None)
        for new in plan.new_rows:
            self._rows[new.row] = RequestSlot.of(new)
        for chunk in plan.chunks:
            row, blocks = self._rows[chunk.row], chunk.blocks
            self._blocks[chunk.row, row.num_blocks : len(blocks)] = blocks[row.num_blocks :]
            row.num_blocks = len(blocks)

    def block_table(self, chunks: list[ScheduledChunk], width: int) -> np.ndarray:
        """int32 [chunks, width]: the first `width` blocks of each chunk's sequence."""
        return self._blocks[[chunk.row for chunk in chunks], :width]
