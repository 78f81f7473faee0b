"""That `make sanitize` would notice: mistakes made on purpose, each in a process that they end."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from multilora_kernels.cpu import native

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.skipif(
    not hasattr(native.LIB, "__asan_init"), reason="the C++ library has no sanitizers in it"
)

START = """
from ctypes import byref
import torch
from multilora_kernels.cpu import native
x, out, mask = torch.zeros(1, 128), torch.zeros(1, 64), torch.zeros(1, 1, dtype=torch.int32)
"""
MISTAKES = {
    "read of a number": (
        "native.LIB.apply_token_mask(byref(native.MaskArgs("
        "logits=out.data_ptr(), mask=mask.data_ptr(), rows=1, vocab=64, num_threads=1)))",
        "heap-buffer-overflow.*READ of size 4",
    ),
    "read of a vector": (
        "native.LIB.silu_mul(byref(native.SiluArgs("
        "out=out.data_ptr(), x=x[0, 64:].data_ptr(), tokens=1, inter=64, num_threads=1)))",
        "heap-buffer-overflow.*READ of size",
    ),
    "write": (
        "native.LIB.silu_mul(byref(native.SiluArgs("
        "out=out[0, 32:].data_ptr(), x=x.data_ptr(), tokens=1, inter=64, num_threads=1)))",
        "heap-buffer-overflow.*WRITE of size",
    ),
    "undefined behaviour": (
        "native.LIB.apply_token_mask(byref(native.MaskArgs("
        "logits=out.data_ptr() + 1, mask=mask.data_ptr(), rows=1, vocab=32, num_threads=1)))",
        "runtime error: store to misaligned address",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_ends_the_process(mistake: str, run_python: Callable[..., str]) -> None:
    code, report = MISTAKES[mistake]
    run_python(START)
    with pytest.raises(AssertionError, match=f"(?s){report}"):
        run_python(START + code)
