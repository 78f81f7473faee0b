"""Log probabilities. Oracle: log_softmax in float64."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from multilora.device.cpu import Device
from multilora.sampling.logprobs import collect_logprobs, launch_logprobs
from tests.harness.sampler_calls import make_logits, make_row, sample, token_logprobs

if TYPE_CHECKING:
    pass


# -- log probabilities --
def test_each_row_gets_as_many_logprobs_as_it_wants() -> None:
    logits, tops = make_logits(4, 50), [3, 0, 7, 1]
    handle = launch_logprobs(Device(), logits, torch.tensor([1, 2, 3, 4]), tops)
    expected = [token_logprobs(logits[i : i + 1], [1 + i], top)[0] for i, top in enumerate(tops)]
    assert collect_logprobs(handle) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprobs_agree_with_float64(dtype: torch.dtype) -> None:
    logits = make_logits(16, 997).to(dtype)
    targets = [i * 83 % 997 for i in range(9)]
    exact = logits.double().log_softmax(-1)
    for i, entry in enumerate(token_logprobs(logits, targets, 5)):
        likeliest = logits[i].double().sort(descending=True, stable=True).indices[:5].tolist()
        assert list(entry) == list(dict.fromkeys([targets[i], *likeliest]))
        for token, found in entry.items():
            assert found.logprob == pytest.approx(float(exact[i, token]), abs=2e-6)
            assert found.rank == 1 + int((logits[i] > logits[i, token]).sum())


def test_sampled_logprobs_are_of_the_raw_distribution() -> None:
    logits = make_logits(1, 50)
    second = int(logits[0].topk(2).indices[1])
    row = make_row(temperature=0.3, top_k=1, logit_bias={second: 50.0}, logprobs=4)
    (got,) = sample(logits, [row])
    assert got.token == second
    assert got.logprobs == token_logprobs(logits, [second], 4)[0]
    assert got.logprobs[second].rank == 2


def test_zero_logprobs_give_the_chosen_token_only() -> None:
    (got,) = sample(make_logits(1, 50), [make_row(logprobs=0)])
    assert got.logprobs is not None
    assert list(got.logprobs) == [got.token]


def test_tied_logits_share_a_rank_and_the_lowest_ids_are_listed() -> None:
    logits = torch.tensor([[0.0, 1.0, 0.0, 0.0, 1.0, 0.0]])
    (entry,) = token_logprobs(logits, [5], 3)
    assert {token: found.rank for token, found in entry.items()} == {5: 3, 1: 1, 4: 1, 0: 3}


def test_more_logprobs_than_tokens_give_them_all() -> None:
    assert sorted(token_logprobs(torch.zeros(1, 3), [2], 20)[0]) == [0, 1, 2]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("vocab", [128, 997, 32000])
@pytest.mark.usefixtures("restored_threads")
def test_prompt_logprobs_never_see_other_rows(threads: int, vocab: int) -> None:
    logits = make_logits(21, vocab, seed=2)
    targets = list(range(21))
    torch.set_num_threads(1)
    alone = [token_logprobs(logits[i : i + 1].clone(), [i], 2)[0] for i in targets]
    torch.set_num_threads(threads)
    for count in (1, 2, 16, 17, 21):
        assert token_logprobs(logits[:count], targets[:count], 2) == alone[:count]
    assert token_logprobs(logits.flip(0), targets[::-1], 2) == alone[::-1]
