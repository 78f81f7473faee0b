"""The guard sees what it says: each fault here would pass, or only look odd, without it."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from multilora_kernels.testing.guard import GuardError, guarded


@triton.jit
def _copy(out_ptr, x_ptr, count, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < count
    tl.store(out_ptr + offs, tl.load(x_ptr + offs, mask=mask, other=0.0), mask=mask)


def test_a_clean_kernel_passes_in_any_order() -> None:
    x = torch.randn(37)
    for order in (None, 0, 1):
        out = torch.zeros(37)
        with guarded(order=order):
            _copy[(5,)](out, x, 37, 8)
        assert torch.equal(out, x)


@pytest.mark.parametrize(("x", "out"), [(36, 37), (37, 36)], ids=["load", "store"])
def test_lanes_out_of_bounds(x: int, out: int) -> None:
    name = "x_ptr" if x < out else "out_ptr"
    with guarded(), pytest.raises(GuardError, match=f"1 of 5 lanes, .* byte 144 of '{name}'"):
        _copy[(5,)](torch.zeros(out), torch.zeros(x), 37, 8)


def test_the_message_names_the_program() -> None:
    with guarded(), pytest.raises(GuardError, match=r"program \(4, 0, 0\): load out of bounds"):
        _copy[(5,)](torch.zeros(37), torch.zeros(36), 37, 8)


def test_a_view_may_use_all_of_its_storage() -> None:
    base, out = torch.randn(64), torch.zeros(8)
    with guarded():
        _copy[(1,)](out, base[16:24], 8, 8)
    assert torch.equal(out, base[16:24])


@triton.jit
def _gather(out_ptr, addresses_ptr, COUNT: tl.constexpr):
    for i in tl.static_range(COUNT):
        source = tl.load(addresses_ptr + i).to(tl.pointer_type(tl.float32))
        tl.store(out_ptr + i, tl.load(source))


def test_tensors_reached_by_address_are_named_as_extra() -> None:
    parts, out = [torch.full((1,), float(i)) for i in range(3)], torch.zeros(3)
    addresses = torch.tensor([part.data_ptr() for part in parts])
    with guarded(), pytest.raises(GuardError, match="out of bounds"):
        _gather[(1,)](out, addresses, 3)
    with guarded(extra=parts):
        _gather[(1,)](out, addresses, 3)
    assert out.tolist() == [0, 1, 2]


@triton.jit
def _overlap(out_ptr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * (BLOCK - 1) + tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, tl.program_id(0).to(tl.float32))


def test_two_programs_that_write_one_address() -> None:
    with guarded(), pytest.raises(GuardError, match=r"race: program \(1, 0, 0\) writes .*out_ptr"):
        _overlap[(2,)](torch.zeros(16), 8)


@triton.jit
def _prefix_sum(x_ptr):
    pid = tl.program_id(0)
    before = tl.load(x_ptr + pid - 1, mask=pid > 0, other=0.0)
    tl.store(x_ptr + pid, tl.load(x_ptr + pid) + before)


def test_a_kernel_that_depends_on_the_order_of_programs() -> None:
    """It is right in the interpreter's order and in no other."""
    x = torch.ones(16)
    _prefix_sum[(16,)](x)
    assert torch.equal(x, torch.arange(1.0, 17.0))
    with guarded(), pytest.raises(GuardError, match="reads what another program writes"):
        _prefix_sum[(16,)](torch.ones(16))


def test_shuffled_order_shows_without_the_race_check() -> None:
    found = set()
    for order in range(3):
        x = torch.ones(16)
        with guarded(order=order, hazards=False):
            _prefix_sum[(16,)](x)
        found.add(tuple(x.tolist()))
    assert len(found) == 3


@triton.jit
def _swap(x_ptr):
    pid = tl.program_id(0)
    value = tl.load(x_ptr + 1 - pid)
    tl.store(x_ptr + pid, value)


def test_writing_what_another_program_has_read() -> None:
    with guarded(), pytest.raises(GuardError, match="race"):
        _swap[(2,)](torch.ones(2))


@triton.jit
def _one_place(out_ptr, values_ptr, BLOCK: tl.constexpr):
    tl.store(out_ptr + tl.arange(0, BLOCK) // 2, tl.load(values_ptr + tl.arange(0, BLOCK)))


def test_one_store_of_two_values_to_one_address() -> None:
    with guarded():
        _one_place[(1,)](torch.zeros(4), torch.ones(8), 8)
    with guarded(), pytest.raises(GuardError, match="two values"):
        _one_place[(1,)](torch.zeros(4), torch.arange(8.0), 8)


@triton.jit
def _no_other(out_ptr, x_ptr, count, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, tl.load(x_ptr + offs, mask=offs < count))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_masked_lanes_without_other_are_poisoned(dtype: torch.dtype) -> None:
    x, out = torch.ones(8, dtype=dtype), torch.zeros(8, dtype=dtype)
    _no_other[(1,)](out, x, 5, 8)
    assert out[5:].tolist() == [0, 0, 0]  # a GPU promises nothing of the kind
    with guarded():
        _no_other[(1,)](out, x, 5, 8)
    assert (out[:5] == 1).all()
    assert out[5:].isnan().all()


def test_masked_integers_without_other_are_huge() -> None:
    x, out = torch.ones(8, dtype=torch.int32), torch.zeros(8, dtype=torch.int32)
    with guarded():
        _no_other[(1,)](out, x, 5, 8)
    assert (out[5:] > 2**29).all()


@triton.jit
def _count(total_ptr, SIZE: tl.constexpr):
    tl.atomic_add(total_ptr + tl.arange(0, SIZE) * 0, 1)


def test_atomics_are_no_race_but_have_bounds() -> None:
    total = torch.zeros(1, dtype=torch.int32)
    with guarded():
        _count[(4,)](total, 8)
    assert total == 32


def test_errors_that_are_none_of_the_guards_stay_as_they_are() -> None:
    @triton.jit
    def wrong(x_ptr):
        tl.static_assert(False, "no such case")

    with guarded(), pytest.raises(Exception, match="no such case") as caught:
        wrong[(1,)](torch.zeros(1))
    assert not isinstance(caught.value, GuardError)


def test_outside_the_block_nothing_is_watched() -> None:
    with guarded():
        pass
    base = torch.arange(4.0)
    _overlap[(2,)](torch.zeros(16), 8)
    out = torch.zeros(4)
    _copy[(1,)](out, base, 4, 4)
    assert torch.equal(out, base)
