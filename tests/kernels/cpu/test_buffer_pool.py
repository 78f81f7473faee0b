"""Memory that is used again."""

from __future__ import annotations

import sys
from types import FrameType

import torch
from hypothesis import given
from hypothesis import strategies as st

import multilora_kernels as mk


@given(st.lists(st.tuples(st.integers(1, 5000), st.integers(0, 3)), max_size=60))
def test_live_tensors_of_a_pool_are_apart(steps: list[tuple[int, int]]) -> None:
    pool, live = mk.BufferPool(), []
    for i, (count, freed) in enumerate(steps):
        tensor = pool.empty((count,), torch.int32).fill_(i)
        assert tensor.data_ptr() % 64 == 0
        assert pool.owns(tensor)
        live.append((i, tensor[: count // 2 + 1]))  # a view holds it as well
        del tensor
        del live[:freed]
        assert all(bool((view == value).all()) for value, view in live)


def test_memory_that_nobody_holds_is_given_again() -> None:
    pool = mk.BufferPool()
    first = pool.empty((100,), torch.float32)
    at, view = first.data_ptr(), first.view(10, 10)[3]
    del first
    assert pool.empty((100,), torch.float32).data_ptr() != at
    del view
    assert pool.empty((7, 13), torch.float32).data_ptr() == at  # about as large
    assert not pool.owns(torch.empty(5))
    assert pool.empty((0, 3), torch.float32).shape == (0, 3)


def test_what_is_borrowed_holds_nothing_back() -> None:
    pool = mk.BufferPool()
    tensor = pool.empty((4, 5), torch.bfloat16).fill_(3)
    at, borrowed = tensor.data_ptr(), pool.borrow(tensor)
    del tensor
    assert borrowed.shape == (4, 5)
    assert borrowed.eq(3).all()
    pool.empty((4, 5), torch.bfloat16).fill_(4)
    assert borrowed.eq(4).all()
    assert borrowed.data_ptr() == at


def test_a_pool_grows_by_regions_and_takes_large_tensors() -> None:
    pool = mk.BufferPool()
    tensors = [pool.empty((9 << 20,), torch.uint8).fill_(i) for i in range(4)]
    tensors.append(pool.empty((70 << 20,), torch.uint8).fill_(4))
    assert all(t.eq(i).all() for i, t in enumerate(tensors))
    assert all(pool.owns(t) for t in tensors)


def test_a_block_comes_back_without_a_call_of_pythons() -> None:
    """What a finalizer raises is lost: a Ctrl-C must not come within one."""
    pool = mk.BufferPool()
    tensor = pool.empty((4, 4), torch.float32)
    calls: list[str] = []
    sys.setprofile(lambda frame, event, _: calls.append(event) if event == "call" else None)
    try:
        del tensor
    finally:
        sys.setprofile(None)
    assert calls == []
    first = pool.empty((4, 4), torch.float32).data_ptr()
    assert pool.empty((4, 4), torch.float32).data_ptr() == first


def test_an_interrupt_anywhere_leaves_a_pool_that_works() -> None:
    """Also between a block and the note of where it goes back to."""
    pool, number, left = mk.BufferPool(), 0, 0

    def see(frame: FrameType, event: str, _: object) -> None:
        nonlocal left
        # Of the pool alone: an interrupt within torch's no_grad leaves it on for all other tests.
        if not frame.f_code.co_filename.endswith("cpu/buffer_pool.py") or event == "return":
            return
        left -= 1
        if left == 0:
            raise KeyboardInterrupt

    done = False
    while not done:
        number += 1
        left = number
        sys.setprofile(see)
        try:
            tensor = pool.empty((50,), torch.float32)
            done, left = left > 0, 0  # there are not so many points
        except KeyboardInterrupt:
            pass
        finally:
            sys.setprofile(None)
        tensor = pool.empty((50,), torch.float32)
        tensor.fill_(number)
        del tensor
        assert pool.empty((50,), torch.float32).shape == (50,)
    assert number > 8
