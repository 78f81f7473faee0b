"""Log probabilities of tokens and of the likeliest ones beside them, for all rows in one call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

import multilora_kernels as mk

from ..device.cpu import Device, Fetch
from ..outputs import Logprob, TokenLogprobs


@dataclass(frozen=True, slots=True)
class LogprobsHandle:
    """Log probabilities in flight to the host."""

    tops: Sequence[int]  # how many of the likeliest each row wants
    results: Fetch  # int64 ids, fp32 logprobs, int64 ranks, each [rows, 1 + the largest of tops]


def launch_logprobs(
    device: Device,
    logits: Tensor,  # [rows, vocab], any float dtype
    targets: Tensor,  # int64 [rows]
    tops: Sequence[int],  # by row
) -> LogprobsHandle:
    """For each target its log probability and rank in its row, then those of the likeliest tokens.

    They are of the model's own distribution. A rank is 1 + the number of strictly larger logits;
    ties for the last place go to the lowest ids. A row with NaN gives its target a NaN. Never looks
    at a value, so that a GPU need not wait.
    """
    found = mk.top_logprobs(logits, targets, max(tops, default=0))
    return LogprobsHandle(tops, device.fetch(found))


def collect_logprobs(handle: LogprobsHandle) -> list[TokenLogprobs]:
    """Waits for them; of each row the target first, and each token once."""
    columns = [part.tolist() for part in handle.results.wait()]
    return [
        {
            token: Logprob(logprob, rank)
            for token, logprob, rank, _ in zip(*row, range(1 + top), strict=False)
        }
        for *row, top in zip(*columns, handle.tops, strict=True)
    ]
