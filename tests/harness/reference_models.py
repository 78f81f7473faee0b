"""An engine's log-probabilities beside those of a transformers model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from multilora.outputs import RequestOutput, TokenLogprobs

TOLERANCE = 1e-4
JOB_FIELDS = {"logprobs": 20, "prompt_logprobs": 20}


def check(output: RequestOutput, model: Any) -> None:
    """Every log-probability within the tolerance of the model's, and each token its best one."""
    answer = output.outputs[0]
    prompt = output.prompt_token_ids
    ids = torch.tensor([prompt + answer.token_ids])
    with torch.no_grad():
        wanted = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
    assert output.prompt_logprobs is not None
    assert answer.logprobs is not None
    found = [*output.prompt_logprobs[1:], *answer.logprobs]
    assert len(found) == len(wanted)
    worst = max(_error(row, want) for row, want in zip(found, wanted, strict=True) if row)
    assert worst <= TOLERANCE
    assert wanted[len(prompt) - 1 :].argmax(-1).tolist() == answer.token_ids


def _error(found: TokenLogprobs | None, wanted: Tensor) -> float:
    assert found is not None
    assert len(found) >= 20
    return max(abs(wanted[token].item() - entry.logprob) for token, entry in found.items())
