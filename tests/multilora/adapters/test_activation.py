"""Where an activated LoRA begins in a prompt."""

from __future__ import annotations

import random

import pytest

from multilora.adapters.activation import activate, find_invocation
from multilora.adapters.mix import mix_identity
from multilora.errors import RequestError

MIX = (("a", 1.0),)


@pytest.mark.parametrize("seed", range(20))
def test_it_is_pefts_offset(seed: int) -> None:
    variants = pytest.importorskip("peft.tuners.lora.variants")
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    draw = random.Random(seed)
    invocation = [draw.randrange(3) for _ in range(draw.randint(1, 4))]
    config = {"a": peft.LoraConfig(task_type="CAUSAL_LM", alora_invocation_tokens=invocation)}
    for _ in range(20):
        prompt = [draw.randrange(3) for _ in range(draw.randint(1, 30))]
        (offset,) = variants.calculate_alora_offsets(config, "a", torch.tensor([prompt]))
        wanted = None if offset is None else len(prompt) - offset
        assert find_invocation(invocation, prompt) == wanted


def test_a_plain_mix_is_active_everywhere_and_the_base_nowhere() -> None:
    assert activate(MIX, (), [1, 2], "base") == (MIX, mix_identity(MIX), 0)
    assert activate((), (), [1, 2], "error") == ((), mix_identity(()), None)


def test_without_an_invocation_the_base_answers_or_it_is_an_error() -> None:
    assert activate(MIX, (2, 3), [1, 2, 3, 4], "error") == (MIX, mix_identity(MIX), 1)
    assert activate(MIX, (2, 3), [1, 2, 4], "base") == ((), mix_identity(()), None)
    with pytest.raises(RequestError, match=r"tokens \[2, 3\]; add it, or start with alora_missing"):
        activate(MIX, (2, 3), [1, 2, 4], "error")


def test_an_invocation_longer_than_the_prompt_is_not_in_it() -> None:
    assert find_invocation([1, 2, 3], [1, 2]) is None
