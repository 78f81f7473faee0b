"""Calls of the C++ library that are kept and made again, and the pool that their results lie in."""

from __future__ import annotations

import threading

import pytest
import torch

import multilora_kernels as mk
from multilora_kernels.cpu import graph, native

needs_cpp = pytest.mark.skipif(not native.HAS_CPP, reason="the C++ library is not built")


# Graphs -------------------------------------------------------------------------------------------


@needs_cpp
def test_a_graph_computes_on_what_its_memory_holds_by_then() -> None:
    x, weight, norm = torch.randn(5, 64), mk.pack(torch.randn(96, 64)), torch.randn(96)
    with mk.capture(mk.BufferPool()) as captured:
        y = mk.silu_mul(mk.rms_norm(mk.linear(x, weight), norm, 1e-5))
    sequence = mk.KernelSequence(captured.take())
    x.normal_()
    sequence.run()
    assert torch.equal(y, mk.silu_mul(mk.rms_norm(mk.linear(x, weight), norm, 1e-5)))
    assert len(sequence) == 3


@needs_cpp
def test_a_graph_says_what_took_how_long() -> None:
    x, weight = torch.randn(64, 512), mk.pack(torch.randn(512, 512))
    with mk.capture(mk.BufferPool()) as captured:
        mk.silu_mul(mk.linear(x, weight))
    found = mk.KernelSequence(captured.take()).measure()
    assert [name for name, _, _ in found] == ["linear", "silu_mul"]
    assert [args.rows for name, args, _ in found if name == "linear"] == [64]
    assert all(0 < seconds < 10 for _, _, seconds in found)


@needs_cpp
def test_a_graph_checks_indices_each_time() -> None:
    y, x = torch.zeros(3, 16), torch.randn(3, 16)
    a, b = torch.randn(2, 1, 8, 16), torch.randn(2, 8, 16)
    table = mk.Table(torch.tensor([[1]], dtype=torch.int32), torch.ones(1, 1), torch.ones(1).int())
    tiles = mk.make_tiles([0, 0, -1], 16)
    with mk.capture(mk.BufferPool()) as captured:
        mk.lora_(y, x, a, b, table, tiles, (0, 16))
    sequence, once = mk.KernelSequence(captured.take()), y.clone()
    table.page_ids[0, 0] = 2
    with pytest.raises(IndexError, match="page id"):
        sequence.run()
    assert torch.equal(y, once)
    table.page_ids[0, 0] = 1
    sequence.run()
    assert not torch.equal(y, once)


@needs_cpp
def test_what_is_called_outside_of_a_capture_or_in_another_thread_is_not_kept() -> None:
    x = torch.randn(2, 32)
    with mk.capture(mk.BufferPool()) as captured:
        with mk.capture(mk.BufferPool()) as inner:
            mk.silu_mul(x)
        other = threading.Thread(target=mk.silu_mul, args=(x,))
        other.start()
        other.join()
        mk.silu_mul(x)
    mk.silu_mul(x)
    assert len(captured.take()) == len(inner.take()) == 1
    assert not captured.take()


@needs_cpp
def test_a_capture_that_fails_leaves_nothing_behind() -> None:
    x, pool = torch.randn(2, 32), mk.BufferPool()
    with pytest.raises(KeyError), mk.capture(pool):
        raise KeyError
    assert not pool.owns(mk.silu_mul(x))


@needs_cpp
def test_a_call_names_all_the_memory_that_it_uses() -> None:
    """What a recording trusts: an operator whose calls use other memory is recorded as a whole."""
    x, weight = torch.randn(64, 6).T, mk.pack(torch.randn(96, 64))
    with mk.capture(mk.BufferPool()) as captured:
        y = mk.linear(x, weight)
    (call,) = captured.take()
    assert isinstance(call.args, native.LinearArgs)
    at = {t.data_ptr() for t in call.tensors}
    assert {call.args.y, call.args.x, call.args.packed} == at
    assert y.data_ptr() in at
    assert x.data_ptr() not in at  # its rows are no rows in memory: a copy was multiplied


# Results of calls outside of a capture ------------------------------------------------------------


@needs_cpp
def test_results_come_from_a_pool_where_one_is_given() -> None:
    x, pool, inner = torch.randn(2, 32), mk.BufferPool(), mk.BufferPool()
    with mk.results_in(pool):
        kept = mk.silu_mul(x)
        at = mk.silu_mul(x).data_ptr()
        with mk.results_in(inner):
            assert inner.owns(mk.silu_mul(x))
        again = mk.silu_mul(x)
    assert pool.owns(kept)
    assert again.data_ptr() == at != kept.data_ptr()
    assert torch.equal(kept, again)
    assert not pool.owns(mk.silu_mul(x))


@needs_cpp
def test_very_large_results_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "LARGEST", 127)
    x, pool = torch.randn(2, 32), mk.BufferPool()
    with mk.results_in(pool):
        assert not pool.owns(mk.silu_mul(x))  # 128 bytes
        assert pool.owns(mk.silu_mul(x[:1]))
        with mk.capture(pool):  # whose graphs need memory that stays
            assert pool.owns(mk.silu_mul(x))
