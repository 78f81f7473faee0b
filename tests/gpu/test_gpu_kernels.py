"""Every op on the device against the reference in float64, and captured with changing segments."""

from __future__ import annotations

import random
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import multilora_kernels as mk
from multilora.device.cpu import Device
from multilora_kernels import reference
from multilora_kernels.testing.precision import to_float64
from tests.harness.gpu_rehearsal import REHEARSED
from tests.harness.kernel_calls.lora import POPULARITY, LoraCall, make_lora_call

pytestmark = pytest.mark.gpu

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# Rounding of one result, and what a GPU's fp32 products may lose (TF32 has 10 bits).
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 4e-3}
RANKS = (8, 16, 64, 128)
SLICES = (0, 512, 640, 768)
INNER = 256 if REHEARSED else 1024
LORA_ROWS = (
    [(1, 16), (23, 16), (70, 64)] if REHEARSED else [(1, 16), (23, 16), (130, 64), (512, 64)]
)

by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


class Lora(NamedTuple):
    """A site with one slot for each of RANKS, and a slot that mixes the first two."""

    a: Tensor  # [pages, slices, 8, in]
    b: Tensor  # [pages, 8, out]
    table: mk.Table

    def on(self, device: Device) -> Lora:
        place = device.torch
        table = mk.Table(*(None if t is None else t.to(place) for t in self.table))
        return Lora(self.a.to(place), self.b.to(place), table)


def lora_of(dtype: torch.dtype) -> Lora:
    pages = [rank // 8 for rank in RANKS]
    order = torch.randperm(sum(pages)).tolist()
    lists, weights = [], []
    for count in pages:
        lists.append([order.pop() for _ in range(count)])
        weights.append([1.0] * count)
    lists.append(lists[0] + lists[1])
    weights.append([0.5] * pages[0] + [-2.0] * pages[1])
    width = max(map(len, lists))
    table = mk.Table(
        torch.tensor([ids + [0] * (width - len(ids)) for ids in lists], dtype=torch.int32),
        torch.tensor([ws + [0.0] * (width - len(ws)) for ws in weights]),
        torch.tensor([len(ids) for ids in lists], dtype=torch.int32),
    )
    a = torch.randn(sum(pages), len(SLICES) - 1, 8, INNER) / INNER**0.5
    b = torch.randn(sum(pages), 8, SLICES[-1]) / 8
    return Lora(a.to(dtype), b.to(dtype), table)


def token_slots(popularity: str, tokens: int) -> list[int]:
    draw = random.Random(tokens)
    slots = {
        "distinct": [i % 5 for i in range(tokens)],
        "identical": [2] * tokens,
        "skewed": draw.choices(range(5), [8, 4, 2, 1, 1], k=tokens),
        "half base": [draw.choice((-1, i % 5)) for i in range(tokens)],
        "base": [-1] * tokens,
    }
    return sorted(slots[popularity])


def tiles_on(device: Device, slots: list[int], tile: int, size: int | None = None) -> mk.Tiles:
    return mk.Tiles(*(t.to(device.torch) for t in mk.make_tiles(slots, tile, size)))


def error(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    assert found.isfinite().all()
    wanted = wanted.to(found.device)
    return float((found.double() - wanted.double()).abs().max() / wanted.double().abs().max())


@by_dtype
@pytest.mark.parametrize("popularity", ["distinct", "identical", "skewed", "half base", "base"])
@pytest.mark.parametrize(("tokens", "tile"), LORA_ROWS)
def test_lora(device: Device, dtype: torch.dtype, popularity: str, tokens: int, tile: int) -> None:
    lora, slots = lora_of(dtype), token_slots(popularity, tokens)
    x, y = torch.randn(tokens, INNER).to(dtype), torch.randn(tokens, SLICES[-1]).to(dtype)
    wanted = y.double()
    tiles = mk.make_tiles(slots, tile)
    reference.lora_(wanted, x.double(), lora.a.double(), lora.b.double(), lora.table, tiles, SLICES)
    there, ours = lora.on(device), y.to(device.torch)
    args = (x.to(device.torch), there.a, there.b, there.table, tiles_on(device, slots, tile))
    mk.lora_(ours, *args, SLICES)
    assert error(ours, wanted) < TOLERANCE[dtype]
    base = torch.tensor(slots) < 0
    assert torch.equal(ours.cpu()[base], y[base])


@by_dtype
@pytest.mark.parametrize("pages", [None, torch.float32], ids=["own dtype", "fp32 pages"])
def test_lora_with_scales_and_bias(
    device: Device, dtype: torch.dtype, pages: torch.dtype | None
) -> None:
    case = make_lora_call(POPULARITY["zipf"], dtype, dora=True)
    if pages is not None:
        case = case._replace(a_pages=case.a_pages.to(pages), b_pages=case.b_pages.to(pages))
    wide = LoraCall(*to_float64(*case))
    reference.lora_(*wide)
    there = LoraCall(*(t.to(device.torch) if isinstance(t, Tensor) else t for t in case))
    table = mk.Table(*(None if t is None else t.to(device.torch) for t in case.table))
    tiles = mk.Tiles(*(t.to(device.torch) for t in case.tiles))
    mk.lora_(*there._replace(table=table, tiles=tiles))
    assert error(there.y, wide.y) < TOLERANCE[dtype]


@by_dtype
def test_a_row_does_not_depend_on_its_neighbours(device: Device, dtype: torch.dtype) -> None:
    lora, slots = lora_of(dtype).on(device), token_slots("skewed", 150)
    x = torch.randn(150, INNER, device=device.torch).to(dtype)
    together = torch.zeros(150, SLICES[-1], dtype=dtype, device=device.torch)
    mk.lora_(together, x, lora.a, lora.b, lora.table, tiles_on(device, slots, 16), SLICES)
    for row in (0, 17, 80, 149):
        alone = torch.zeros(1, SLICES[-1], dtype=dtype, device=device.torch)
        tiles = tiles_on(device, [slots[row]], 16)
        mk.lora_(alone, x[row : row + 1], lora.a, lora.b, lora.table, tiles, SLICES)
        assert torch.equal(alone[0], together[row])


@by_dtype
def test_a_captured_lora_takes_other_segments(device: Device, dtype: torch.dtype) -> None:
    lora, tokens, size = lora_of(dtype).on(device), 64, 16
    x = torch.randn(tokens, INNER, device=device.torch).to(dtype)
    tiles = tiles_on(device, [-1] * tokens, 16, size)

    def work() -> Tensor:
        y = torch.zeros(tokens, SLICES[-1], dtype=dtype, device=device.torch)
        mk.lora_(y, x, lora.a, lora.b, lora.table, tiles, SLICES)
        return y

    with torch.inference_mode():
        replay = device.capture(work)
        for popularity in ("identical", "base", "skewed", "half base", "distinct", "identical"):
            slots = token_slots(popularity, tokens)
            for static, new in zip(tiles, tiles_on(device, slots, 16, size), strict=True):
                static.copy_(new)
            x.normal_()
            wanted = work().clone()
            replay.replay()
            assert torch.equal(replay.output, wanted), popularity


@by_dtype
def test_the_stages_apart_are_the_whole(device: Device, dtype: torch.dtype) -> None:
    lora, slots = lora_of(dtype).on(device), token_slots("half base", 40)
    x = torch.randn(40, INNER, device=device.torch).to(dtype)
    y = torch.randn(40, SLICES[-1], device=device.torch).to(dtype)
    tiles, wanted, side = tiles_on(device, slots, 16), y.clone(), device.side()
    mk.lora_(wanted, x, lora.a, lora.b, lora.table, tiles, SLICES)
    with side.fork():
        planes = mk.lora_shrink(x, lora.a, lora.table, tiles, mk.lora_splits(x, lora.a))
    side.join()
    mk.lora_expand_(y, planes, lora.b, lora.table, tiles, SLICES)
    assert torch.equal(y, wanted)


@by_dtype
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("queries", [(1, 1, 1), (5, 1, 40), (0, 1, 0)])
def test_attention(device: Device, dtype: torch.dtype, dim: int, queries: tuple[int, ...]) -> None:
    lens, size = [300, 17, 64], 16
    lens = [length if count else 0 for length, count in zip(lens, queries, strict=True)]
    blocks = torch.randperm(64)[: 3 * 20].view(3, 20).int()
    k, v = (torch.randn(64, size, 2, dim).to(dtype) for _ in range(2))
    q = torch.randn(sum(queries) + 2, 8, dim).to(dtype)  # two rows of padding
    starts = torch.tensor([0, *torch.tensor(queries).cumsum(0)], dtype=torch.int32)
    where = (blocks, torch.tensor(lens, dtype=torch.int32), starts)
    wanted = reference.paged_attention(q.double(), k.double(), v.double(), *where, scale=dim**-0.5)
    there = [t.to(device.torch) for t in (q, k, v, *where)]
    found = mk.paged_attention(
        *there, scale=dim**-0.5, max_query_len=max(queries), max_seq_len=max(*lens, 512)
    )
    assert error(found, wanted) < TOLERANCE[dtype]
    assert not found[sum(queries) :].any()


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("chunks", [[1] * 40, [7, 1, 20, 12]], ids=["tokens", "mixed"])
def test_invariant_attention_has_the_bits_of_any_chunk(
    device: Device, dtype: torch.dtype, chunks: list[int]
) -> None:
    """Positions 1,000 to 1,040, on both sides of a segment's end."""
    place, before = device.torch, 1000
    q = torch.randn(40, 8, 128).to(place, dtype)
    k, v = (torch.randn(66, 16, 2, 128).to(place, dtype) for _ in range(2))
    blocks = torch.randperm(66)[None].int().to(place)

    def attend(rows: Tensor, length: int) -> Tensor:
        lens, starts = torch.tensor([length]).int(), torch.tensor([0, len(rows)]).int()
        return mk.paged_attention(
            rows, k, v, blocks, lens.to(place), starts.to(place), scale=0.1,
            max_query_len=len(rows), max_seq_len=1056, batch_invariant=True,
        )  # fmt: skip

    whole, done = attend(q, before + 40), 0
    for count in chunks:
        part = attend(q[done : done + count], before + done + count)
        assert torch.equal(part, whole[done : done + count])
        done += count


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_an_invariant_linears_rows_are_apart(device: Device, dtype: torch.dtype) -> None:
    """Every tile height that a row count chooses, and other places in a tile."""
    x = torch.randn(600, 1000).to(device.torch, dtype)
    weight = torch.randn(200, 1000).to(device.torch, dtype)
    whole = mk.linear(x, weight, batch_invariant=True)
    for rows in (slice(7, 8), slice(590, 600), slice(3, 67), slice(100, 300), slice(33, 600)):
        assert torch.equal(mk.linear(x[rows], weight, batch_invariant=True), whole[rows])


@by_dtype
def test_the_small_ops(device: Device, dtype: torch.dtype) -> None:
    tokens, dim, place = 37, 64, device.torch
    x, residual = (torch.randn(tokens, 512).to(dtype) for _ in range(2))
    weight = torch.rand(512).to(dtype)
    wanted_sum = residual.clone()
    wanted = reference.rms_norm(x, weight, 1e-5, wanted_sum)
    ours_sum = residual.to(place)
    assert error(mk.rms_norm(x.to(place), weight.to(place), 1e-5, ours_sum), wanted) < 2e-2
    assert torch.equal(ours_sum.cpu(), wanted_sum)
    assert error(mk.silu_mul(x.to(place)), reference.silu_mul(x)) < 2e-2
    matrix = torch.randn(96, 512).to(dtype) / 512**0.5
    ours = mk.linear(x.to(place), matrix.to(place))
    assert error(ours, x.double() @ matrix.double().T) < TOLERANCE[dtype]
    fused = torch.randn(tokens, 6, dim).to(dtype)
    cos, sin = torch.rand(100, dim // 2), torch.rand(100, dim // 2)
    positions, kv_slots = torch.randint(100, (tokens,)), torch.randperm(64)[:tokens] - 1
    results = []
    for op, target in ((reference.rope_store_kv_, "cpu"), (mk.rope_store_kv_, place)):
        q, k, v = fused.clone().to(target).split((4, 1, 1), 1)
        kv = [torch.zeros(4, 16, 1, dim, dtype=dtype, device=target) for _ in range(2)]
        rest = [t.to(target) for t in (cos, sin, positions, kv_slots)]
        op(q, k, v, *rest, *kv)
        results.append((q, *kv))
    for ours, theirs in zip(results[1], results[0], strict=True):
        assert error(ours, theirs) < TOLERANCE[dtype]
    logits, mask = torch.randn(3, 70).to(dtype), torch.randint(-(2**31), 2**31, (3, 3)).int()
    masked, there = logits.clone(), logits.to(place)
    reference.apply_token_mask_(masked, mask)
    mk.apply_token_mask_(there, mask.to(place))
    assert torch.equal(there.cpu(), masked)
