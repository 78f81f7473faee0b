"""Where in a request its adapters are active: everywhere, or from an invocation on.

An activated LoRA (aLoRA) leaves the tokens before its invocation alone. Their KV is the base's own,
so all such adapters and the base share it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..errors import RequestError
from .mix import Mix, mix_identity


class Activation(NamedTuple):
    """What computes the tokens of a request: the base, and from `start` on its mix."""

    mix: Mix
    identity: bytes  # of the mix
    start: int | None  # position in the prompt; None = the base alone


def activate(
    mix: Mix, invocation: Sequence[int], prompt_ids: Sequence[int], missing: str
) -> Activation:
    """The activation of a mix, whose adapter is an activated LoRA if there is an invocation.

    Where the prompt has none, the base answers alone, or with `missing` "error" a RequestError is
    raised.
    """
    start: int | None = 0 if mix else None
    if invocation:
        start = find_invocation(invocation, prompt_ids)
        if start is None and missing == "error":
            raise RequestError(
                f"the prompt does not have the adapter's invocation, the tokens {list(invocation)}"
                "; add it, or start with alora_missing='base' to have the base answer"
            )
        mix = () if start is None else mix
    return Activation(mix, mix_identity(mix), start)


def find_invocation(invocation: Sequence[int], prompt_ids: Sequence[int]) -> int | None:
    """Position of the first token of the last invocation in a prompt; None if there is none.

    As PEFT's `calculate_alora_offsets`, which counts from the end.
    """
    tokens = np.asarray(prompt_ids, np.int64)
    starts = np.arange(len(tokens) - len(invocation) + 1)
    for offset, token in enumerate(invocation):
        starts = starts[tokens[starts + offset] == token]
    return int(starts[-1]) if len(starts) else None
