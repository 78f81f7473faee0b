"""`pack_lora` against `x @ A.T @ B.T * scaling` in float64, and against PEFT's own layers."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

import multilora_kernels as mk
from multilora_kernels import LoraWeights
from multilora_kernels.testing.precision import assert_close
from tests.harness.kernel_calls.dtypes import by_dtype

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

IN, OUT = 40, 56
RANKS = (8, 3, 24, 17, 1, 64)
SLOTS = [0, 0, -1, 1, 2, 3, 3, 3, -1, 4, 5]  # of the tokens


def weights(rank: int, out: int = OUT, dtype: torch.dtype = torch.float32) -> LoraWeights:
    a, b = torch.randn(rank, IN) / IN**0.5, torch.randn(out, rank) / max(rank, 1) ** 0.5
    return LoraWeights(a.to(dtype), b.to(dtype), 0.5 + torch.rand(()).item())


def rows(dtype: torch.dtype, out: int = OUT) -> tuple[Tensor, Tensor]:
    return torch.randn(len(SLOTS), out).to(dtype), torch.randn(len(SLOTS), IN).to(dtype)


def delta(x: Tensor, own: LoraWeights) -> Tensor:
    return x.double() @ own.a.double().T @ own.b.double().T * own.scaling


def added(y: Tensor, x: Tensor, packed: mk.PackedLora, starts: Sequence[int] = (0, OUT)) -> Tensor:
    found = y.clone()
    mk.lora_(found, x, *packed, mk.make_tiles(SLOTS, mk.DECODE_TILE), starts)
    return found


# ---- what it packs --------------------------------------------------------------------------


@by_dtype
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_adapters_of_any_rank_share_a_batch(dtype: torch.dtype, stored: torch.dtype) -> None:
    adapters = [weights(rank, dtype=stored) for rank in RANKS]
    (y, x), packed = rows(dtype), mk.pack_lora(adapters, dtype=dtype)
    expected = y.double()
    for i, slot in enumerate(SLOTS):
        if slot >= 0:
            expected[i] += delta(x[i], adapters[slot])
    assert packed.a_pages.dtype == packed.b_pages.dtype == dtype
    assert_close(added(y, x, packed), expected)


def test_only_ranks_are_rounded_up() -> None:
    packed = mk.pack_lora([weights(rank) for rank in RANKS])
    assert packed.table.num_pages.tolist() == [1, 1, 3, 3, 1, 8]
    assert packed.a_pages.shape == (17, 1, 8, IN)
    assert packed.b_pages.shape == (17, 8, OUT)
    assert packed.table.page_ids[3, :3].tolist() == [5, 6, 7]
    assert not packed.a_pages[7, 0, 1:].any()  # 17 rows fill one row of the third page
    assert not packed.b_pages[7, 1:].any()


@by_dtype
def test_slices_of_a_fused_linear(dtype: torch.dtype) -> None:
    starts = (0, 24, 40, 56)  # q, k, v
    adapters = [
        [weights(8, 24), weights(8, 16), weights(8, 16)],
        [weights(5, 24), None, weights(12, 16)],
        [None, weights(30, 16), None],
    ]
    y, x = rows(dtype)
    chosen, expected = [slot if slot < 3 else 1 for slot in SLOTS], y.double()
    for i, slot in enumerate(chosen):
        for (first, last), own in zip(pairwise(starts), adapters[slot], strict=True):
            if slot >= 0 and own is not None:
                expected[i, first:last] += delta(x[i], own)
    packed = mk.pack_lora(adapters, starts, dtype=dtype)
    assert packed.table.num_pages.tolist() == [1, 2, 4]
    mk.lora_(y, x, *packed, mk.make_tiles(chosen, mk.PREFILL_TILE), starts)
    assert_close(y, expected)


def test_a_mix_is_the_weighted_sum_without_a_copy() -> None:
    adapters = [weights(rank) for rank in (8, 20, 3)]
    mixes = [[(1, 0.7), (0, 0.3)], [(2, -1.0)], [], [(0, 1.0), (1, 1.0), (2, 1.0)], [(0, 2)], []]
    (y, x), packed = rows(torch.float32), mk.pack_lora(adapters, mixes=mixes)
    expected = y.double()
    for i, slot in enumerate(SLOTS):
        for adapter, weight in mixes[slot] if slot >= 0 else []:
            expected[i] += weight * delta(x[i], adapters[adapter])
    assert len(packed.a_pages) == 1 + 3 + 1
    assert packed.table.num_pages.tolist() == [4, 1, 0, 5, 1, 0]
    assert_close(added(y, x, packed), expected)


def test_the_scaling_meets_b_in_fp32_before_the_one_cast() -> None:
    own = weights(8, dtype=torch.bfloat16)._replace(scaling=1 / 3)
    packed = mk.pack_lora([own])
    assert torch.equal(packed.a_pages[0, 0], own.a)
    assert torch.equal(packed.b_pages[0], (own.b.float() * (1 / 3)).bfloat16().T)


def test_adapters_of_no_rank_add_nothing() -> None:
    (y, x), packed = rows(torch.float32), mk.pack_lora([weights(0)] * len(RANKS))
    assert packed.a_pages.shape == (0, 1, 8, IN)
    assert torch.equal(added(y, x, packed), y)


def test_the_pages_serve_the_definition_and_the_stages() -> None:
    packed, (y, x) = mk.pack_lora([weights(rank) for rank in RANKS]), rows(torch.float32)
    tiles, expected = mk.make_tiles(SLOTS, mk.DECODE_TILE), y.clone()
    mk.reference.lora_(expected, x, *packed, tiles, (0, OUT))
    planes = mk.lora_shrink(x, packed.a_pages, packed.table, tiles)
    mk.lora_expand_(y, planes, packed.b_pages, packed.table, tiles, (0, OUT))
    assert_close(y, expected)


def test_an_embedding_takes_the_transposed_pages() -> None:
    adapters = [weights(rank) for rank in RANKS]  # `in` is the vocabulary
    (a_pages, b_pages, table), (y, _) = mk.pack_lora(adapters), rows(torch.float32)
    ids = torch.randint(IN, (len(SLOTS),))
    expected = y.double()
    for i, slot in enumerate(SLOTS):
        if slot >= 0:
            one_hot = torch.nn.functional.one_hot(ids[i], IN)
            expected[i] += delta(one_hot, adapters[slot])
    tiles = mk.make_tiles(SLOTS, mk.DECODE_TILE)
    mk.lora_embed_(y, ids, a_pages[:, 0].mT.contiguous(), b_pages, table, tiles)
    assert_close(y, expected)


# ---- PEFT -----------------------------------------------------------------------------------


def peft_layers(ranks: Sequence[int], **options: Any) -> Any:
    """One linear that PEFT has adapted by each of these ranks, adapter i by name "i"."""
    peft = pytest.importorskip("peft")
    model = torch.nn.Sequential(torch.nn.Linear(IN, OUT, bias=False))
    for i, rank in enumerate(ranks):
        config = peft.LoraConfig(r=rank, lora_alpha=2 * rank + 3, target_modules=["0"], **options)
        if i:
            model.add_adapter(str(i), config)
        else:
            model = peft.get_peft_model(model, config, adapter_name="0")
    for name, values in model.named_parameters():
        if "lora_B" in name or "magnitude" in name:
            values.data = torch.rand_like(values) + 0.5
    return model


def of_peft(model: Any, count: int) -> tuple[list[LoraWeights], Any]:
    layer = model.base_model.model[0]
    names = [str(i) for i in range(count)]
    return [
        LoraWeights(layer.lora_A[n].weight, layer.lora_B[n].weight, layer.scaling[n]) for n in names
    ], layer


@pytest.mark.parametrize("use_rslora", [False, True], ids=["lora", "rslora"])
def test_peft_layers_go_in_as_they_are(use_rslora: bool) -> None:
    model = peft_layers(RANKS, use_rslora=use_rslora)
    adapters, layer = of_peft(model, len(RANKS))
    assert adapters[0].a.requires_grad  # as PEFT leaves it: packing takes a copy
    _, x = rows(torch.float32)
    with torch.no_grad():
        y = layer.base_layer(x)
        expected = y.clone()
        for i, slot in enumerate(SLOTS):
            if slot >= 0:
                model.set_adapter(str(slot))
                expected[i] = model(x[i : i + 1])[0]
    assert_close(added(y, x, mk.pack_lora(adapters)), expected)


def test_dora_is_b_times_g_and_a_scale_in_the_table() -> None:
    ranks = (8, 3, 17)
    model = peft_layers(ranks, use_dora=True)
    adapters, layer = of_peft(model, len(ranks))
    base = layer.base_layer.weight.detach()
    gs, folded = [], []
    for i, own in enumerate(adapters):
        changed = base + own.scaling * own.b @ own.a
        g = layer.lora_magnitude_vector[str(i)].weight / changed.norm(dim=1)
        gs.append(g.detach())
        folded.append(own._replace(b=g[:, None] * own.b))
    packed = mk.pack_lora(folded)
    row = torch.arange(len(ranks), dtype=torch.int32)
    packed = packed._replace(table=packed.table._replace(scale_row=row, scale=torch.stack(gs)))
    (_, x), chosen = rows(torch.float32), [min(slot, 2) for slot in SLOTS]
    with torch.no_grad():
        y = layer.base_layer(x)
        expected = y.clone()
        for i, slot in enumerate(chosen):
            if slot >= 0:
                model.set_adapter(str(slot))
                expected[i] = model(x[i : i + 1])[0]
    mk.lora_(y, x, *packed, mk.make_tiles(chosen, mk.DECODE_TILE), (0, OUT))
    assert_close(y, expected)


def test_a_pool_of_strided_pages_is_written_in_place() -> None:
    own = weights(17)
    a_pool, b_pool = torch.zeros(5, 2, 8, IN), torch.zeros(5, 8, 70)
    mk.write_lora_(a_pool[1:4, 1], b_pool[1:4, :, 10:66], own)
    packed = mk.pack_lora([own])
    assert torch.equal(a_pool[1:4, 1:], packed.a_pages)
    assert torch.equal(b_pool[1:4, :, 10:66], packed.b_pages)
    assert a_pool.count_nonzero() == packed.a_pages.count_nonzero()
    assert b_pool.count_nonzero() == packed.b_pages.count_nonzero()


# ---- mistakes -------------------------------------------------------------------------------

ONE = weights(8)


def pages(count: int) -> tuple[Tensor, Tensor]:
    return torch.zeros(count, 8, IN), torch.zeros(count, 8, OUT)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: mk.write_lora_(torch.zeros(1, 8, IN), torch.zeros(1, 8, 9), ONE), "A must be"),
        (lambda: mk.write_lora_(*pages(1), weights(9)), "rank 9 does not fit 1 pages"),
        (lambda: mk.pack_lora([]), "no weights"),
        (lambda: mk.pack_lora([[None]]), "no weights"),
        (lambda: mk.pack_lora([ONE, weights(8, 48)]), r"adapter 1: .*\[56, rank\].*\[48, 8\]"),
        (lambda: mk.pack_lora([LoraWeights(ONE.a.T, ONE.b)]), r"adapter 0: .*\[40, 8\]"),
        (lambda: mk.pack_lora([LoraWeights(ONE.a, ONE.b.T)]), r"adapter 0: .*\[8, 56\]"),
        (lambda: mk.pack_lora([LoraWeights(ONE.a[:4], ONE.b)]), r"adapter 0: .*\[4, 40\]"),
        (lambda: mk.pack_lora([ONE, [ONE, ONE]]), "adapter 1 has 2 slices, not 1"),
        (lambda: mk.pack_lora([ONE], (0, 24, 56)), "adapter 0 has 1 slices, not 2"),
        (lambda: mk.pack_lora([ONE], (8, 56)), "begin with 0"),
        (lambda: mk.pack_lora([ONE], (0,)), "begin with 0"),
        (lambda: mk.pack_lora([[ONE, ONE]], (0, 56, 24)), "not fall"),
        (lambda: mk.pack_lora([ONE], mixes=[[(1, 1.0)]]), "adapter 1, but there are 1"),
        (lambda: mk.pack_lora([ONE], mixes=[[(-1, 1.0)]]), "adapter -1"),
        (lambda: mk.pack_lora([ONE], dtype=torch.float64), "not float64"),
        (lambda: mk.pack_lora([LoraWeights(ONE.a[0], ONE.b)]), "matrices"),
        (lambda: mk.pack_lora([LoraWeights(torch.tensor(1.0), ONE.b)]), "matrices"),
    ],
)
def test_mistakes_raise(call: Callable[[], object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        call()


def test_plain_tuples_are_refused_by_name() -> None:
    with pytest.raises(TypeError, match="LoraWeights"):
        mk.pack_lora([(ONE.a, ONE.b, 2.0)])  # type: ignore[list-item]
