"""What counts as a new variant of a kernel in a rehearsal."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from tests.harness.launch_keys import key_of, on_new_key


@triton.jit
def _kernel(out_ptr, count, pair, SIZE: tl.constexpr):
    offs = tl.arange(0, SIZE)
    tl.store(out_ptr + offs, offs, mask=offs < count)


@triton.jit(do_not_specialize=["count"])
def _plain_kernel(out_ptr, count, pair, SIZE: tl.constexpr):
    offs = tl.arange(0, SIZE)
    tl.store(out_ptr + offs, offs, mask=offs < count)


OUT = torch.zeros(64, dtype=torch.int32)
BASE: dict[str, Any] = {"args": (OUT, 5, (3, None)), "SIZE": 16, "num_warps": 4}


def key(kernel: Any = _kernel, args: tuple[Any, ...] = BASE["args"], **changed: Any) -> Any:
    options = {"SIZE": 16, "num_warps": 4, "grid": (1,), "warmup": False} | changed
    return key_of(kernel, args, options)


@pytest.mark.parametrize(
    ("count", "same"), [(7, True), (-3, True), (1, False), (16, False), (0, False), (2**40, False)]
)
def test_an_integer_is_known_by_what_triton_specialises_on(count: int, same: bool) -> None:
    assert (key(args=(OUT, count, (3, None))) == key()) == same
    one, other = (key(_plain_kernel, args=(OUT, n, (3, None))) for n in (5, count))
    assert (one == other) == (count < 2**31)


def test_types_constants_options_and_tuples_count_and_the_grid_does_not() -> None:
    assert key(grid=(7,)) == key()
    changed = [
        key(SIZE=32),
        key(num_warps=8),
        key(args=(OUT.long(), 5, (3, None))),
        key(args=(OUT[1:], 5, (3, None))),  # 4 bytes off
        key(args=(OUT, 5.0, (3, None))),
        key(args=(OUT, 5, (16, None))),
        key(args=(OUT, 5, (3, 3))),
    ]
    assert key() not in changed
    assert len(set(changed)) == len(changed)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    from triton.runtime.interpreter import InterpretedFunction

    monkeypatch.setattr(InterpretedFunction, "run", InterpretedFunction.run)  # put back after this
    names: list[str] = []
    on_new_key(names.append)
    return names


def test_a_launch_is_told_once(seen: list[str]) -> None:
    for count in (5, 7, 16, 5):
        _kernel[(1,)](OUT, count, (3, None), SIZE=16)
    assert seen == ["_kernel", "_kernel"]
    assert OUT[4] == 4
