"""Huge pages are asked for, and only for memory of ours that is large."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

# Prints whether the kernel notes the wish ("hg") for the memory in the middle of a tensor, before
# and after. A process of its own: in this one torch.empty writes to what it gives.
ASK = """
import os, torch
from multilora_kernels import huge_pages

def is_wanted(tensor):
    middle, inside = tensor.data_ptr() + tensor.nbytes // 2, False
    for line in open("/proc/self/smaps"):
        head = line.split()[0]
        if "-" in head:
            first, last = (int(end, 16) for end in head.split("-"))
            inside = first <= middle < last
        elif inside and head == "VmFlags:":
            return "hg" in line.split()
    raise AssertionError("no mapping holds the tensor")

tensor = torch.empty(int(os.environ["BYTES"]), dtype=torch.uint8)
before = is_wanted(tensor)
assert huge_pages(tensor) is tensor
print(before, is_wanted(tensor))
tensor.fill_(7)
assert int(tensor[0]) == int(tensor[-1]) == 7
"""


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists() or sys.platform != "linux",
    reason="this kernel has no transparent huge pages",
)
@pytest.mark.parametrize(("size", "wanted"), [(64 << 20, True), (1 << 20, False)])
def test_huge_pages_are_wanted_for_large_memory(
    run_python: Callable[..., str], size: int, wanted: bool
) -> None:
    assert run_python(ASK, BYTES=str(size)).split() == ["False", str(wanted)]
