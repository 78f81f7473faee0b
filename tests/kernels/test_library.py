"""The registration of ops: every device's function has the schema's arguments under its names."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import pytest
import torch

from multilora_kernels import Columns, PackedWeight, Table, Tiles, library

OPS = (
    "add_rms_norm_",
    "apply_token_mask_",
    "draw",
    "linear",
    "linear_packed",
    "lora_",
    "lora_columns_",
    "lora_embed_",
    "lora_expand_",
    "lora_shrink",
    "lora_splits",
    "paged_attention",
    "rms_norm",
    "rope_store_kv_",
    "silu_mul",
    "top_logprobs",
)
each_op = pytest.mark.parametrize("name", OPS)


def test_these_are_the_ops() -> None:
    for key in ("CPU", "CUDA", "Meta"):
        assert sorted(library.KERNELS[key]) == list(OPS)


@each_op
@pytest.mark.parametrize("key", ["CPU", "CUDA", "Meta"])
def test_the_dispatcher_has_a_function_for_every_device(name: str, key: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"multilora::{name}", key)


def arguments(name: str) -> list[tuple[str, bool, Any]]:
    """Name, whether there is a default, and which, of a schema's arguments, tuples as one."""
    fields = {f"table_{f}": "table" for f in Table._fields}
    fields |= {f"tiles_{f}": "tiles" for f in Tiles._fields}
    fields |= {f"changes_{f}": "changes" for f in Columns._fields}
    if name == "linear_packed":
        fields |= {f"weight_{f}": "weight" for f in PackedWeight._fields}
    schema = getattr(torch.ops.multilora, name).default._schema
    listed = [
        (fields.get(a.name, a.name), a.has_default_value(), a.default_value)
        for a in schema.arguments
    ]
    return list(dict.fromkeys(listed))


@each_op
@pytest.mark.parametrize("key", ["CPU", "CUDA"])
def test_a_function_has_the_schemas_arguments(name: str, key: str) -> None:
    """The dispatcher leaves out trailing defaults, so the functions must have them too."""
    parameters = inspect.signature(library.KERNELS[key][name]).parameters.values()
    found = [(p.name, p.default) for p in parameters]
    for (own, default), (wanted, has_default, value) in zip(found, arguments(name), strict=True):
        assert own == wanted
        if has_default:
            assert default == value


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor | None
    size: int


class Other(NamedTuple):
    count: int
    name: str


def is_same(found: Pair, wanted: Pair) -> bool:
    seconds = found.second is wanted.second is None or (
        found.second is not None
        and wanted.second is not None
        and torch.equal(found.second, wanted.second)
    )
    return torch.equal(found.first, wanted.first) and found.size == wanted.size and seconds


@pytest.fixture(autouse=True)
def _own_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        library, "KERNELS", {key: dict(own) for key, own in library.KERNELS.items()}
    )


def test_a_tuple_is_taken_apart_and_put_together_by_name() -> None:
    seen: list[Any] = []
    op = library.register(
        "test_one(Tensor x, Pair pair, int n, bool flag=True) -> ()",
        Pair,
        cpu=lambda x, pair, n, flag=True: seen.append((pair, n, flag)),
        cuda=lambda *_: None,
    )
    names = " ".join(argument.name for argument in op._schema.arguments)
    assert names == "x pair_first pair_second pair_size n flag"
    pairs = Pair(torch.ones(1), None, 3), Pair(torch.ones(2), torch.ones(3), 4)
    op(torch.zeros(1), *pairs[0], 7)
    op(torch.zeros(1), *pairs[1], 8, False)
    for (found, n, flag), wanted in zip(seen, pairs, strict=True):
        assert isinstance(found, Pair)
        assert is_same(found, wanted)
        assert (n, flag) == ((7, True) if wanted is pairs[0] else (8, False))


def test_two_tuples_stand_side_by_side() -> None:
    seen: list[Any] = []
    op = library.register(
        "test_two(Pair pair, Other other, Tensor x) -> ()",
        Pair,
        Other,
        cpu=lambda *args: seen.extend(args),
        cuda=lambda *_: None,
    )
    pair, other = Pair(torch.ones(2), torch.ones(3), 4), Other(5, "six")
    op(*pair, *other, torch.zeros(1))
    assert is_same(seen[0], pair)
    assert isinstance(seen[1], Other)
    assert seen[1] == other
    assert seen[2].shape == (1,)


def test_tuples_apart_are_refused() -> None:
    with pytest.raises(ValueError, match="side by side"):
        library.register(
            "test_apart(Other a, Tensor x, Other b) -> ()",
            Other,
            cpu=lambda *_: None,
            cuda=lambda *_: None,
        )
