"""Tensors in huge pages: what they hold, where they lie, when their memory goes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

import multilora_kernels as mk
from multilora_kernels.cpu import huge_pages as memory

if TYPE_CHECKING:
    from collections.abc import Callable

has_huge_pages = pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists() or sys.platform != "linux",
    reason="this kernel has no transparent huge pages",
)

# Whether the kernel notes the wish ("hg") for the private memory of tensors that are small, large,
# and torch's; then how many bytes are unmapped when one of them is gone.
ASK = """
import torch
from multilora_kernels import empty_huge

def flags(tensor):
    middle, inside = tensor.data_ptr() + tensor.nbytes // 2, False
    for line in open("/proc/self/smaps"):
        head = line.split()[0]
        if "-" in head:
            first, last = (int(end, 16) for end in head.split("-"))
            inside = first <= middle < last
        elif inside and head == "VmFlags:":
            return line.split()
    raise AssertionError("no mapping holds the tensor")

def mapped():
    return int(open("/proc/self/statm").read().split()[0]) * 4096

small, large = empty_huge((300, 7), torch.bfloat16), empty_huge((64 << 20,), torch.uint8)
plain = torch.empty(64 << 20, dtype=torch.uint8)
print(*("hg" in flags(x) and "sh" not in flags(x) for x in (small, large, plain)))
before = mapped()
del large
print((before - mapped()) >> 20)
"""


@pytest.mark.seconds
@has_huge_pages
def test_huge_pages_are_wanted_and_given_back(run_python: Callable[..., str]) -> None:
    wanted, freed = run_python(ASK).strip().splitlines()
    assert wanted.split() == ["True", "True", "False"]
    assert int(freed) >= 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8], ids=str)
def test_tensors_are_apart_and_aligned(dtype: torch.dtype) -> None:
    shapes = [(3, 5), (1,), (1000, 17), (0, 4), (memory.REGION // 3,), (memory.REGION,), (2, 2)]
    tensors = [mk.empty_huge(shape, dtype) for shape in shapes]
    for i, tensor in enumerate(tensors):
        tensor.fill_(i + 1)
    for i, (tensor, shape) in enumerate(zip(tensors, shapes, strict=True)):
        assert (tensor.shape, tensor.dtype) == (shape, dtype)
        assert tensor.is_contiguous()
        assert tensor.data_ptr() % 64 == 0
        assert bool((tensor == i + 1).all())


def test_a_region_lives_as_long_as_one_of_its_tensors() -> None:
    kept = mk.empty_huge((8,), torch.float32).fill_(7.0)
    for _ in range(5):  # more than a region, each freed
        mk.empty_huge((memory.REGION // 16,), torch.float32).fill_(1.0)
    assert kept.tolist() == [7.0] * 8


def test_memory_that_there_is_not_is_an_error() -> None:
    with pytest.raises(MemoryError, match="cannot be mapped"):
        mk.empty_huge((1 << 60,), torch.uint8)


def test_other_devices_allocate_as_torch_does() -> None:
    assert mk.empty_huge((2, 3), torch.float32, "meta").is_meta
