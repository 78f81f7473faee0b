"""What torch asks of every op: opcheck, `torch.compile`, an error where a gradient is wanted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

import multilora_kernels as mk
from multilora_kernels import library
from tests.harness.kernel_calls.all_ops import all_op_calls

OPS = sorted(all_op_calls())
by_op = pytest.mark.parametrize("name", OPS)
# torch's compiler warns of what it imports itself.
compiles = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def copied(values: Any) -> Any:
    return tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, values)


def tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def test_there_is_a_call_of_every_op() -> None:
    assert sorted(library.KERNELS["CPU"]) == OPS


@pytest.mark.seconds
@by_op
def test_opcheck(name: str) -> None:
    torch.library.opcheck(getattr(torch.ops.multilora, name).default, all_op_calls()[name].flat)


@pytest.mark.seconds
@compiles
@by_op
def test_compiled_it_gives_the_same(name: str) -> None:
    """Results, and arguments changed in place, in one graph."""
    _, function, args = all_op_calls()[name]
    ours, theirs = copied(args), copied(args)
    expected = function(*theirs)
    torch.compiler.reset()
    whole = name != "lora_splits"  # a number is no part of a graph
    found = torch.compile(function, fullgraph=whole)(*ours)
    for mine, other in zip(tensors((found, ours)), tensors((expected, theirs)), strict=True):
        assert torch.equal(mine, other)


FLOATS = [
    (name, place)
    for name, call in all_op_calls().items()
    if name != "lora_splits"  # which looks at shapes alone
    for place, leaf in enumerate(tree_leaves(call.args))
    if isinstance(leaf, Tensor) and leaf.is_floating_point()
]


@pytest.mark.parametrize(("name", "place"), FLOATS)
def test_an_argument_that_requires_grad_is_refused(name: str, place: int) -> None:
    """Each floating argument, those inside of tuples included; nothing is changed by then."""
    _, function, args = all_op_calls()[name]
    leaf = tree_leaves(args)[place]
    before = copied(args)
    leaf.requires_grad_()
    with pytest.raises(mk.NotDifferentiable, match=r"no gradients: .* torch\.no_grad\(\)"):
        function(*args)
    for tensor, old in zip(tensors(args), tensors(before), strict=True):
        assert torch.equal(tensor.detach(), old)
    with torch.no_grad():
        function(*args)
    leaf.requires_grad_(False)


@pytest.mark.seconds
@compiles
def test_compiled_it_refuses_gradients_too() -> None:
    x = torch.randn(2, 8, requires_grad=True)
    torch.compiler.reset()
    with pytest.raises(Exception, match="no gradients"):
        torch.compile(mk.silu_mul)(x)
