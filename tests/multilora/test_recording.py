"""Captured work on a CPU: what changes at a replay, what stays, what cannot be captured."""

from __future__ import annotations

import pytest
import torch

import multilora_kernels as mk
from multilora.recording import Recording


def test_a_replay_reads_what_the_buffers_hold_by_then() -> None:
    x, calls = torch.arange(6.0), []

    def work() -> torch.Tensor:
        calls.append(1)
        return (x.view(2, 3).T @ torch.ones(2, 1)).flatten() * 2

    recording = Recording(work)
    output = recording.output
    x += 1
    assert output.tolist() == [6, 10, 14]
    recording.replay()
    assert recording.output is output
    assert output.tolist() == [10, 14, 18]
    assert len(calls) == 1


def test_work_in_place_starts_from_fresh_memory_at_each_replay() -> None:
    x = torch.ones(3)

    def work() -> torch.Tensor:
        total = torch.zeros_like(x)
        for _ in range(2):
            total.add_(x)
        return total

    recording = Recording(work)
    recording.replay()
    recording.replay()
    assert recording.output.tolist() == [2, 2, 2]


def test_our_own_operators_are_recorded_whole() -> None:
    x, weight = torch.randn(16, 32), torch.randn(8, 32)
    recording = Recording(lambda: mk.silu_mul(mk.linear(x, weight)))
    assert len(recording) == 2
    x.normal_()
    recording.replay()
    assert torch.equal(recording.output, mk.silu_mul(mk.linear(x, weight)))


def test_numbers_of_the_host_stay_as_they_were() -> None:
    x, factor = torch.ones(2), [3]
    recording = Recording(lambda: x * factor[0])
    factor[0] = 5
    recording.replay()
    assert recording.output.tolist() == [3, 3]


@pytest.mark.parametrize(
    "look", [lambda x: x * int(x[0]), lambda x: x[x > 0], lambda x: x.nonzero()]
)
def test_work_that_looks_at_a_value_cannot_be_captured(look: object) -> None:
    x = torch.ones(2)
    with pytest.raises(RuntimeError, match="reads a value on the host"):
        Recording(lambda: look(x))  # type: ignore[operator]
