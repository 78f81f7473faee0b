"""Captured work on a CPU: what changes at a replay, what stays, what cannot be captured."""

from __future__ import annotations

import gc
import weakref
from typing import TYPE_CHECKING

import pytest
import torch

import multilora_kernels as mk
from multilora.device.cpu_graph import CpuGraph

if TYPE_CHECKING:
    from collections.abc import Callable

needs_cpp = pytest.mark.skipif(not mk.HAS_CPP, reason="the C++ library is not built")


def test_a_replay_reads_what_the_buffers_hold_by_then() -> None:
    x, calls = torch.arange(6.0), []

    def work() -> torch.Tensor:
        calls.append(1)
        return (x.view(2, 3).T @ torch.ones(2, 1)).flatten() * 2

    recording = CpuGraph(work)
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

    recording = CpuGraph(work)
    recording.replay()
    recording.replay()
    assert recording.output.tolist() == [2, 2, 2]


def test_our_own_operators_are_recorded_whole() -> None:
    x, weight = torch.randn(16, 32), torch.randn(8, 32)
    recording = CpuGraph(lambda: mk.silu_mul(mk.linear(x, weight)))
    assert len(recording) == 2
    x.normal_()
    recording.replay()
    assert torch.equal(recording.output, mk.silu_mul(mk.linear(x, weight)))


def test_numbers_of_the_host_stay_as_they_were() -> None:
    x, factor = torch.ones(2), [3]
    recording = CpuGraph(lambda: x * factor[0])
    factor[0] = 5
    recording.replay()
    assert recording.output.tolist() == [3, 3]


@needs_cpp
def test_calls_in_a_row_are_one_program_whose_results_share_memory() -> None:
    x, weight, norm = torch.randn(4, 64), mk.pack(torch.randn(64, 64)), torch.randn(64)
    pool, depth = mk.BufferPool(), 30

    def work() -> torch.Tensor:
        y = x * 2
        for _ in range(depth):
            y = mk.rms_norm(mk.linear(y, weight), norm, 1e-5)
        return y

    recordings = [CpuGraph(work, pool) for _ in range(5)]
    assert len({pool.empty((4, 64), torch.float32).data_ptr() for _ in range(9)}) == 1
    for recording in recordings:
        assert [len(sequence) for sequence in recording.sequences()] == [2 * depth]
        assert len(recording) == 2
        x.normal_()
        recording.replay()
        assert torch.equal(recording.output, work())
        assert recording.output.data_ptr() == recordings[0].output.data_ptr()


@pytest.mark.seconds
def test_a_capture_does_not_import_torchs_compiler(run_python: Callable[..., str]) -> None:
    code = (
        "import sys, torch; from multilora.device.cpu_graph import CpuGraph; x = torch.ones(2); "
        "CpuGraph(lambda: x + 1).replay(); print('torch._dynamo' in sys.modules)"
    )
    assert run_python(code).split() == ["False"]


@needs_cpp
def test_a_result_that_an_operator_of_torch_reads_stays_in_place() -> None:
    x, weight = torch.randn(4, 64), mk.pack(torch.randn(64, 64))

    def work() -> torch.Tensor:
        first = mk.linear(x, weight)
        second = mk.linear(first, weight)
        third = mk.linear(second, weight)
        return mk.linear(first + third, weight)

    recording = CpuGraph(work)
    x.normal_()
    recording.replay()
    assert torch.equal(recording.output, work())


@needs_cpp
def test_an_operator_that_copies_first_is_recorded_as_a_whole() -> None:
    x, weight = torch.randn(64, 4), mk.pack(torch.randn(64, 64))
    recording = CpuGraph(lambda: mk.linear(x.T, weight))
    assert not recording.sequences()
    x.normal_()
    recording.replay()
    assert torch.equal(recording.output, mk.linear(x.T, weight))


@needs_cpp
def test_what_the_calls_read_stays_alive() -> None:
    x, weights = torch.randn(4, 64), [mk.pack(torch.randn(64, 64)) for _ in range(2)]
    recording = CpuGraph(lambda: mk.linear(mk.linear(x, weights[0]), weights[1]))
    alive = [weakref.ref(weight.data) for weight in weights]
    weights.clear()
    gc.collect()
    assert all(ref() is not None for ref in alive)
    del recording
    gc.collect()
    assert all(ref() is None for ref in alive)


@pytest.mark.parametrize(
    "look", [lambda x: x * int(x[0]), lambda x: x[x > 0], lambda x: x.nonzero()]
)
def test_work_that_looks_at_a_value_cannot_be_captured(look: object) -> None:
    x = torch.ones(2)
    with pytest.raises(RuntimeError, match="reads a value on the host"):
        CpuGraph(lambda: look(x))  # type: ignore[operator]
