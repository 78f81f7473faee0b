"""The sampler that never looks at the host against the one that does, row by row."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from multilora.device.cpu import Device
from multilora.device.cpu_graph import CpuGraph
from multilora.device.input_buffer import InputBuffer
from multilora.sampling.device import Adjuster, Choice, choose, draw_fields
from multilora.sampling.host import SampleRow, sample
from multilora.sampling_params import SamplingParams

VOCAB = 2000
CPU = torch.device("cpu")


def random_row(draw: random.Random) -> SampleRow:
    """Any sampling parameters, each of them off in most rows."""

    def some(value: Any, off: Any) -> Any:
        return value if draw.random() < 0.3 else off

    params = SamplingParams(
        temperature=draw.choice((0.0, 0.3, 1.0, 2.0)),
        top_k=some(draw.choice((1, 7, 100, 1999)), 0),
        top_p=some(draw.choice((1e-6, 0.3, 0.9, 0.999)), 1.0),
        min_p=some(draw.choice((0.01, 0.5)), 0.0),
        repetition_penalty=some(draw.choice((0.5, 1.7)), 1.0),
        presence_penalty=some(draw.choice((-1.0, 1.5)), 0.0),
        frequency_penalty=some(draw.choice((-0.5, 0.7)), 0.0),
        logit_bias=some({3: 5.0, 11: -100.0}, None),
        allowed_token_ids=some(draw.sample(range(VOCAB), 40), None),
        min_tokens=some(4, 0),
    )
    prompt = [draw.randrange(VOCAB) for _ in range(5)]
    output = [draw.randrange(VOCAB) for _ in range(draw.randrange(8))]
    return SampleRow(params, draw.getrandbits(60), prompt, output, frozenset((2, 3)))


def both(logits: torch.Tensor, rows: list[SampleRow]) -> tuple[list[Any], list[Any]]:
    """(token, failed) of each row from the two samplers."""
    choices = [
        Choice(row, Adjuster.of(row, logits.shape[1], CPU), len(row.output_ids)) for row in rows
    ]
    sent = InputBuffer(Device(), 1 << 16).send(draw_fields(choices, logits.shape[1]))
    tokens, failed = choose(logits, choices, sent)
    ours = list(zip(tokens.tolist(), failed.tolist(), strict=True))
    return ours, [(s.token, s.failed) for s in sample(logits, rows)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_chooses_the_same_tokens(dtype: torch.dtype) -> None:
    draw = random.Random(1)
    for _ in range(40):
        rows = [random_row(draw) for _ in range(16)]
        logits = (torch.randn(16, VOCAB) * draw.choice((0.5, 3, 10))).to(dtype)
        ours, theirs = both(logits, rows)
        assert ours == theirs


def test_equal_logits_are_taken_by_their_ids() -> None:
    draw = random.Random(2)
    rows = [random_row(draw) for _ in range(64)]
    ours, theirs = both(torch.randint(0, 3, (64, VOCAB)).float(), rows)
    assert ours == theirs


@pytest.mark.parametrize("kinds", [2, 30, 400])
def test_a_small_top_k_counts_what_equals_its_last(kinds: int) -> None:
    """Many more tokens may stay than top_k says: ties with the last are no worse."""
    draw = random.Random(5)
    rows = [
        SampleRow(
            SamplingParams(
                temperature=draw.choice((0.5, 1.0)),
                top_k=draw.choice((1, 2, 50, 1023)),
                top_p=draw.choice((0.05, 0.5, 0.97, 1.0)),
                min_p=draw.choice((0.0, 0.0, 0.4)),
            ),
            draw.getrandbits(60),
            [1],
            [2] * draw.randrange(9),
            frozenset(),
        )
        for _ in range(200)
    ]
    logits = torch.randint(-kinds // 2, kinds // 2 + 1, (200, VOCAB)) / 40
    ours, theirs = both(logits, rows)
    assert ours == theirs


def test_a_small_top_k_sorts_no_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    widths: list[int] = []
    sort = torch.Tensor.sort

    def watched(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        widths.append(self.shape[-1])
        return sort(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "sort", watched)
    row = SampleRow(SamplingParams(top_k=40), 5, [1], [], frozenset())
    choice = Choice(row, None, 0)
    sent = InputBuffer(Device(), 4096).send(draw_fields([choice], VOCAB))
    choose(torch.randn(1, VOCAB), [choice], sent)
    assert widths
    assert max(widths) < VOCAB


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("temperature", "top_k"), [(0.0, 0), (1.0, 0), (1.0, 20)])
def test_a_row_without_a_choice_fails_alone(bad: float, temperature: float, top_k: int) -> None:
    row = SampleRow(SamplingParams(temperature=temperature, top_k=top_k), 5, [1], [], frozenset())
    logits = torch.randn(3, VOCAB)
    logits[1, 4 if bad != -float("inf") else slice(None)] = bad
    ours, theirs = both(logits, [row] * 3)
    assert ours == theirs
    assert [failed for _, failed in ours] == [False, True, False]
    assert ours[1][0] == 0


def test_a_chosen_token_counts_for_the_next_choice() -> None:
    params = SamplingParams(temperature=0, frequency_penalty=2.0, repetition_penalty=1.5)
    row = SampleRow(params, 0, [7], [], frozenset())
    adjuster = Adjuster.of(row, VOCAB, CPU)
    logits = torch.randn(1, VOCAB)
    for position in range(12):
        choice = Choice(row, adjuster, position)
        sent = InputBuffer(Device(), 4096).send(draw_fields([choice], VOCAB))
        token = choose(logits, [choice], sent)[0].tolist()
        assert token == [sample(logits, [row])[0].token]
        row.output_ids.extend(token)
    assert len(set(row.output_ids)) > 3


def test_it_never_looks_at_the_host() -> None:
    draw = random.Random(3)
    rows = [random_row(draw) for _ in range(32)]
    choices = [Choice(row, Adjuster.of(row, VOCAB, CPU), len(row.output_ids)) for row in rows]
    sent = InputBuffer(Device(), 1 << 16).send(draw_fields(choices, VOCAB))
    logits = torch.randn(32, VOCAB)
    CpuGraph(lambda: choose(logits, choices, sent)[0])  # which refuses what does
