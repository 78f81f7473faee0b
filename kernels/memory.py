"""Huge pages for what is large and lives long: weights, KV pages, rank pages.

Reading all of a model for every token misses the processor's table of 4-KiB pages all the time, and
the first write to each of them costs more than the write itself. Linux gives pages of 2 MiB to
memory for which it was asked to (its usual setting is `madvise`); torch does not ask.
"""

from __future__ import annotations

import ctypes
import mmap
import sys

from torch import Tensor

LEAST = 2 << 20  # bytes of a huge page


def huge_pages(tensor: Tensor) -> Tensor:
    """The tensor, for whose memory huge pages are now wanted: those not yet written to get them.

    That is advice: where there are none nothing changes. Memory is taken as it is written to, as
    before, in steps of 2 MiB.
    """
    storage = tensor.untyped_storage()
    if sys.platform == "linux" and tensor.device.type == "cpu" and storage.nbytes() >= LEAST:
        page = mmap.PAGESIZE
        start = -(-storage.data_ptr() // page) * page
        end = (storage.data_ptr() + storage.nbytes()) // page * page
        ctypes.CDLL(None).madvise(
            ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_HUGEPAGE
        )
    return tensor
