"""Every op against its definition in `reference` run in float64, and the rows' independence."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import multilora_kernels as ops
from multilora_kernels import Table, Tiles, make_tiles, reference
from multilora_kernels.cpu import lora as cpu_lora
from multilora_kernels.cpu import native

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# |found - expected| <= tolerance * (1 + |expected|), for values of order one.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2.5e-2}
DTYPES = [pytest.param(dtype, id=str(dtype)[6:]) for dtype in TOLERANCE]
PAGES = [1, 2, 3, 8, 1, 5, 2, 4]  # rank pages of each slot
UNUSED = len(PAGES)  # a slot that no token names, full of NaN
STARTS = (0, 5, 30, 47)  # slices of odd widths
POPULARITY = {
    "distinct": list(range(8)),
    "uniform": random.Random(0).choices(range(8), k=24),
    "zipf": sorted(random.Random(1).choices(range(8), [1 / (i + 1) for i in range(8)], k=24)),
    "identical": [3] * 21,
    "skewed": [5] * 17 + [0, 1, 2, -1, 3, 3, 7],
    "half base": [-1, 3, -1, 5, 5, -1] * 3,
    "all base": [-1] * 5,
    "empty": [],
}
popularities = pytest.mark.parametrize("popularity", POPULARITY)
dtypes = pytest.mark.parametrize("dtype", DTYPES)


def assert_close(found: Tensor, expected: Tensor) -> None:
    tolerance = TOLERANCE[found.dtype]
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


def up(*values: Any) -> list[Any]:
    """The values with floating tensors cast to float64, those inside a table included."""
    wide: list[Any] = []
    for value in values:
        if isinstance(value, Table):
            value = Table(*up(*value))
        elif isinstance(value, Tensor) and value.is_floating_point():
            value = value.double()
        wide.append(value)
    return wide


def odd_pages(count: int, *shape: int, dtype: torch.dtype) -> Tensor:
    """Pages of NaN with a gap between them and an offset before the first."""
    numel = torch.Size(shape).numel()
    pages = torch.full((count, numel + 24), torch.nan, dtype=dtype)[:, 8 : 8 + numel]
    pages = pages.unflatten(1, shape)
    assert pages.stride(0) == numel + 24
    assert pages.storage_offset() == 8
    return pages


class Case(NamedTuple):
    """The arguments of `lora_`, in its order."""

    y: Tensor
    x: Tensor
    a_pages: Tensor
    b_pages: Tensor
    table: Table
    tiles: Tiles
    slice_starts: tuple[int, ...]


def make_table(dora: bool, dtype: torch.dtype, out: int) -> tuple[Table, Tensor]:
    """A table of shuffled pages, all that no slot owns left to NaN, and the owned page ids."""
    order = (torch.randperm(sum(PAGES)) + 1).tolist()  # page 0 belongs to nobody
    page_ids = torch.zeros(UNUSED + 1, 8, dtype=torch.int32)
    weights = torch.full((UNUSED + 1, 8), torch.nan)
    for slot, count in enumerate(PAGES):
        page_ids[slot, :count] = torch.tensor([order.pop() for _ in range(count)])
        weights[slot, :count] = 0.5 + torch.rand(count)
    table = Table(page_ids, weights, torch.tensor([*PAGES, 8], dtype=torch.int32))
    if dora:
        scale, bias = torch.full((2, 5, out), torch.nan)
        scale[1:4], bias[1:4] = 0.5 + torch.rand(3, out), torch.randn(3, out)
        row = torch.tensor([1, -1, 2, 3, -1, 1, 2, -1, 0], dtype=torch.int32)
        table = table._replace(scale_row=row, scale=scale.to(dtype), bias=bias.to(dtype))
    return table, torch.arange(1, sum(PAGES) + 1)


def make_case(
    popularity: str,
    dtype: torch.dtype,
    *,
    dora: bool = False,
    starts: tuple[int, ...] = STARTS,
    in_: int = 33,
    size: int | None = None,
) -> Case:
    slots, out, slices = POPULARITY[popularity], starts[-1], len(starts) - 1
    table, owned = make_table(dora, dtype, out)
    a_pages = odd_pages(len(owned) + 2, slices, 8, in_, dtype=dtype)
    b_pages = odd_pages(len(owned) + 2, 8, out, dtype=dtype)
    a_pages[owned] = (torch.randn(len(owned), slices, 8, in_) / in_**0.5).to(dtype)
    b_pages[owned] = (torch.randn(len(owned), 8, out) / 8).to(dtype)
    y, x = torch.randn(len(slots), out).to(dtype), torch.randn(len(slots), in_).to(dtype)
    return Case(y, x, a_pages, b_pages, table, make_tiles(slots, 16, size), starts)


def base_rows(popularity: str) -> Tensor:
    return torch.tensor(POPULARITY[popularity], dtype=torch.long) < 0


# LoRA ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dora", [False, True], ids=["plain", "dora"])
@dtypes
@popularities
def test_lora_adds_each_rows_delta(popularity: str, dtype: torch.dtype, dora: bool) -> None:
    case = make_case(popularity, dtype, dora=dora, size=25)
    before, wide = case.y.clone(), Case(*up(*case))
    ops.lora_(*case)
    reference.lora_(*wide)
    assert_close(case.y, wide.y)
    base = base_rows(popularity)
    assert torch.equal(case.y[base], before[base])
    assert base.all() or not torch.equal(case.y, before)


@pytest.mark.parametrize("split_k", [1, 3])
@dtypes
@popularities
def test_shrink_then_expand_ignores_what_lies_beyond_a_rows_pages(
    popularity: str, dtype: torch.dtype, split_k: int
) -> None:
    case = make_case(popularity, dtype, dora=True)
    before, wide = case.y.clone(), Case(*up(*case))
    planes = ops.lora_shrink(case.x, case.a_pages, case.table, case.tiles, split_k)
    assert planes.shape == (split_k, len(case.x), 3 * 8 * 8)
    assert planes.dtype == torch.float32
    by_page = planes.view(split_k, len(case.x), 3, 8, 8)
    for row, slot in enumerate(POPULARITY[popularity]):
        by_page[:, row, :, PAGES[slot] if slot >= 0 else 0 :] = torch.nan
    ops.lora_expand_(case.y, planes, case.b_pages, *case[4:])
    reference.lora_(*wide)
    assert_close(case.y, wide.y)
    assert torch.equal(case.y[base_rows(popularity)], before[base_rows(popularity)])


@dtypes
def test_lora_head_is_lora_with_one_slice(dtype: torch.dtype) -> None:
    case = make_case("uniform", dtype, starts=(0, 47))
    wide = Case(*up(*case))
    ops.lora_head_(*case[:6])
    reference.lora_(*wide)
    assert_close(case.y, wide.y)


def make_embedding(popularity: str, dtype: torch.dtype, dora: bool = False) -> list[Any]:
    """The arguments of `lora_embed_`."""
    case = make_case(popularity, dtype, dora=dora, starts=(0, 47))
    a_pages = odd_pages(len(case.a_pages), 19, 8, dtype=dtype)
    a_pages[1:-1] = torch.randn(len(a_pages) - 2, 19, 8).to(dtype)
    ids = torch.randint(19, (len(case.y),))
    return [case.y, ids, a_pages, case.b_pages, case.table, case.tiles]


@dtypes
@popularities
def test_lora_embed_takes_the_tokens_column(popularity: str, dtype: torch.dtype) -> None:
    args = make_embedding(popularity, dtype, dora=True)
    before, wide = args[0].clone(), up(*args)
    ops.lora_embed_(*args)
    reference.lora_embed_(*wide)
    assert_close(args[0], wide[0])
    assert torch.equal(args[0][base_rows(popularity)], before[base_rows(popularity)])


def narrow(table: Table, columns: int) -> Table:
    """Views of the first columns, as a step takes whose slots have no more pages."""
    ids, weights = table.page_ids[:, :columns], table.page_weights[:, :columns]
    return table._replace(page_ids=ids, page_weights=weights)


@pytest.mark.parametrize("columns", [5, 6])
@dtypes
def test_a_narrower_view_of_the_table_gives_the_same_bits(
    dtype: torch.dtype, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slots that no tile names have more pages than the view. C++ takes it, where it is there."""
    if native.LIB is not None:
        monkeypatch.setattr(cpu_lora, "_expand", None)
    tiles = make_tiles([5, 5, 0, 2, 2, -1, 1], 16)
    case, embedding = make_case("distinct", dtype, dora=True), make_embedding("distinct", dtype)
    for op, args, rest in (
        (ops.lora_, [case.x[:7], case.a_pages, case.b_pages], [tiles, STARTS]),
        (ops.lora_embed_, [embedding[1][:7], *embedding[2:4]], [tiles]),
    ):
        whole, part = case.y[:7].clone(), case.y[:7].clone()
        op(whole, *args, case.table, *rest)
        op(part, *args, narrow(case.table, columns), *rest)
        assert torch.equal(part, whole)
        assert not torch.equal(part, case.y[:7])


@pytest.mark.parametrize("columns", [2, 4])
def test_a_view_without_a_slots_pages_is_refused(columns: int) -> None:
    case = make_case("distinct", torch.float32)
    with pytest.raises(IndexError, match="a number of pages"):
        ops.lora_(*case[:4], narrow(case.table, columns), *case[5:])


# Attention ----------------------------------------------------------------------------------------

# (tokens of this step, tokens in the cache): prompts, chunks, single tokens, an absent sequence.
MIXED = [(5, 5), (1, 1), (17, 70), (0, 0), (1, 65), (1, 130), (64, 64), (1, 64)]


def make_attention(
    lengths: list[tuple[int, int]],
    dtype: torch.dtype,
    group: int = 2,
    block_size: int = 8,
    quantised: bool = False,
) -> tuple[list[Tensor], dict[str, Any]]:
    """Tensors and keywords of `paged_attention`; blocks and offsets of no sequence hold NaN."""
    kv_heads, dim = 2, 16
    counts = [-(-length // block_size) for _, length in lengths]
    order = (torch.randperm(sum(counts)) + 1).tolist()
    shape = (sum(counts) + 2, block_size, kv_heads, dim)
    k_blocks, v_blocks = torch.full((2, *shape), torch.nan).to(dtype)
    table = torch.zeros(len(lengths), max([0, *counts]) + 1, dtype=torch.int32)
    for i, (_, length) in enumerate(lengths):
        for j in range(counts[i]):
            block = table[i, j] = order.pop()
            live = min(block_size, length - j * block_size)
            for blocks in (k_blocks, v_blocks):
                blocks[block, :live] = torch.randn(live, kv_heads, dim).to(dtype)
    queries = [count for count, _ in lengths]
    starts = torch.tensor([0, *queries]).cumsum(0).int()
    seq_lens = torch.tensor([length for _, length in lengths], dtype=torch.int32)
    q = torch.randn(sum(queries), kv_heads * group, dim).to(dtype)
    kwargs: dict[str, Any] = {"scale": dim**-0.5}
    if quantised:
        kwargs |= {"k_scale": torch.tensor([0.5, 2.0]), "v_scale": torch.tensor([1.5, 0.25])}
    return [q, k_blocks, v_blocks, table, seq_lens, starts], kwargs


def attend(args: list[Tensor], kwargs: dict[str, Any], **more: Any) -> Tensor:
    return ops.paged_attention(*args, **kwargs, max_query_len=64, max_seq_len=130, **more)


@pytest.mark.parametrize("quantised", [False, True], ids=["plain", "scaled"])
@pytest.mark.parametrize(("group", "block_size"), [(1, 8), (2, 1), (4, 16)])
@dtypes
def test_paged_attention(dtype: torch.dtype, group: int, block_size: int, quantised: bool) -> None:
    args, kwargs = make_attention(MIXED, dtype, group, block_size, quantised)
    found = attend(args, kwargs)
    assert_close(found, reference.paged_attention(*up(*args), **kwargs))


@pytest.mark.parametrize(("group", "block_size"), [(1, 8), (4, 1)])
def test_paged_attention_is_torchs_attention(group: int, block_size: int) -> None:
    args, kwargs = make_attention(MIXED, torch.float32, group, block_size)
    found = attend(args, kwargs)
    q, k_blocks, v_blocks, table, _, starts = up(*args)
    for i, (count, length) in enumerate(MIXED):
        if not count:
            continue
        rows = slice(int(starts[i]), int(starts[i + 1]))
        k, v = (blocks[table[i].long()].flatten(0, 1)[:length] for blocks in (k_blocks, v_blocks))
        visible = torch.ones(count, length, dtype=torch.bool).tril(length - count)
        expected = F.scaled_dot_product_attention(
            *(t.transpose(0, 1) for t in (q[rows], k, v)), attn_mask=visible, enable_gqa=True
        )
        assert_close(found[rows], expected.transpose(0, 1))


def test_paged_attention_of_nothing_is_empty() -> None:
    assert attend(*make_attention([], torch.float32)).shape == (0, 4, 16)


def test_paged_attention_rows_of_no_sequence_are_zero_and_out_is_filled() -> None:
    args, kwargs = make_attention([(3, 3)], torch.float32)
    args[0] = F.pad(args[0], (0, 0, 0, 0, 0, 2), value=torch.nan)
    out = torch.full_like(args[0], torch.nan)
    assert attend(args, kwargs, out=out) is out
    assert (out[3:] == 0).all()
    assert out[:3].isfinite().all()


# The rest -----------------------------------------------------------------------------------------


def make_rope(dtype: torch.dtype) -> list[Tensor]:
    q, k, v = (torch.randn(6, heads, 10).to(dtype) for heads in (4, 2, 2))
    angles = torch.randn(20, 5)
    positions, kv_slots = torch.randint(20, (6,)), torch.tensor([3, -1, 0, 23, -1, 8])
    k_blocks, v_blocks = torch.randn(2, 3, 8, 2, 10).to(dtype)
    return [q, k, v, angles.cos(), angles.sin(), positions, kv_slots, k_blocks, v_blocks]


@dtypes
def test_rope_store_kv(dtype: torch.dtype) -> None:
    args = make_rope(dtype)
    wide, before = up(*args), [t.clone() for t in args]
    ops.rope_store_kv_(*args)
    reference.rope_store_kv_(*wide)
    untouched = torch.ones(24, dtype=torch.bool)
    untouched[[3, 0, 23, 8]] = False
    for i in (0, 7, 8):
        assert_close(args[i], wide[i])
    for i in (7, 8):  # -1 stores nothing anywhere
        pages, old = args[i].flatten(0, 1), before[i].flatten(0, 1)
        assert torch.equal(pages[untouched], old[untouched])


def test_rope_store_kv_into_e4m3_pages() -> None:
    args = make_rope(torch.bfloat16)
    args[1][0] *= 1000  # beyond what e4m3 holds
    k_scale, v_scale = torch.tensor([0.5, 2.0]), torch.tensor([1.5, 0.25])
    plain = [t.clone() for t in args]
    ops.rope_store_kv_(*plain)
    args[7:] = [blocks.to(torch.float8_e4m3fn) for blocks in args[7:]]
    ops.rope_store_kv_(*args, k_scale, v_scale)
    assert torch.equal(args[0], plain[0])
    for found, wide, scale in zip(args[7:], plain[7:], (k_scale, v_scale), strict=True):
        stored = [blocks.flatten(0, 1)[[3, 0, 23, 8]].float() for blocks in (found, wide)]
        want = (stored[1] / scale[:, None]).clamp(-448, 448)
        torch.testing.assert_close(stored[0], want, rtol=1 / 16, atol=1e-2)


def test_int8_pages_are_read_as_they_were_stored() -> None:
    """Rounded to the nearest code, cut at 127; attention over them is that over their values."""
    args = make_rope(torch.float32)
    args[1][0] *= 1000  # beyond 127 codes
    scales = torch.tensor([0.02, 0.05]), torch.tensor([0.03, 0.01])
    plain = [t.clone() for t in args]
    ops.rope_store_kv_(*plain)
    args[7:] = [torch.zeros(blocks.shape, dtype=torch.int8) for blocks in args[7:]]
    ops.rope_store_kv_(*args, *scales)
    read = []
    for found, wide, scale in zip(args[7:], plain[7:], scales, strict=True):
        codes, wide = (t.flatten(0, 1)[[3, 0, 23, 8]] for t in (found, wide))
        assert torch.equal(codes, (wide / scale[:, None]).round().clamp(-127, 127).to(torch.int8))
        read.append(found.float() * scale[:, None])
    where = torch.tensor([[0, 1]]).int(), torch.tensor([4]).int(), torch.tensor([0, 2]).int()
    grid = {"scale": 0.3, "max_query_len": 2, "max_seq_len": 4}
    q = args[0][:2]
    found = ops.paged_attention(q, *args[7:], *where, k_scale=scales[0], v_scale=scales[1], **grid)
    assert_close(found, reference.paged_attention(up(q)[0], *up(*read), *where, scale=0.3))


@pytest.mark.parametrize("rows", [0, 1, 17])
@pytest.mark.parametrize("with_residual", [False, True])
@dtypes
def test_rms_norm(dtype: torch.dtype, with_residual: bool, rows: int) -> None:
    x, weight = torch.randn(rows, 33).to(dtype), torch.randn(33).to(dtype)
    residual = torch.randn(rows, 33).to(dtype) if with_residual else None
    x_before, wide = x.clone(), up(x, weight, 1e-5, residual)
    assert_close(ops.rms_norm(x, weight, 1e-5, residual), reference.rms_norm(*wide))
    assert torch.equal(x, x_before)
    if residual is not None:
        assert_close(residual, wide[3])


@pytest.mark.parametrize("rows", [0, 1, 17])
@dtypes
def test_silu_mul(dtype: torch.dtype, rows: int) -> None:
    x = torch.randn(rows, 2 * 47).to(dtype)
    before = x.clone()
    assert_close(ops.silu_mul(x), reference.silu_mul(x.double()))
    assert torch.equal(x, before)


@pytest.mark.parametrize("vocab", [1, 32, 47])
@dtypes
def test_apply_token_mask(dtype: torch.dtype, vocab: int) -> None:
    logits = torch.randn(3, vocab).to(dtype)
    mask = torch.randint(-(2**31), 2**31, (3, -(-vocab // 32))).int()
    mask[0], mask[1] = -1, 0
    expected = logits.clone()
    reference.apply_token_mask_(expected, mask)
    ops.apply_token_mask_(logits, mask)
    assert torch.equal(logits, expected)
    assert logits[0].isfinite().all()
    assert (logits[1] == float("-inf")).all()


@pytest.mark.parametrize("with_bias", [False, True])
@dtypes
def test_linear(dtype: torch.dtype, with_bias: bool) -> None:
    x, weight = torch.randn(17, 33).to(dtype), (torch.randn(47, 33) / 6).to(dtype)
    bias = torch.randn(47).to(dtype) if with_bias else None
    args = [x, weight, bias]
    assert_close(ops.linear(*args), reference.linear(*up(*args)))


# Torch's own checks -------------------------------------------------------------------------------


def op_calls() -> dict[str, list[Any]]:
    """Arguments of each op as the dispatcher sees them."""
    case = make_case("identical", torch.float32, dora=True)  # slot 3 owns all 8 pages
    embed, rope = make_embedding("skewed", torch.float32), make_rope(torch.float32)
    tensors, kwargs = make_attention(MIXED, torch.float32)
    shared, starts = [*case.table, *case.tiles], list(STARTS)
    planes = torch.randn(2, len(case.y), 3 * 8 * 8)
    x = torch.randn(4, 6)
    return {
        "lora_shrink": [case.x, case.a_pages, *shared, 2],
        "lora_splits": [case.x, case.a_pages],
        "lora_expand_": [case.y, planes, case.b_pages, *shared, starts],
        "lora_": [*case[:4], *shared, starts],
        "lora_embed_": [*embed[:4], *embed[4], *embed[5]],
        "paged_attention": [*tensors, kwargs["scale"], 64, 130, None, None],
        "rope_store_kv_": rope,
        "rms_norm": [x, torch.randn(6), 1e-5, torch.randn(4, 6)],
        "silu_mul": [x],
        "apply_token_mask_": [x, torch.tensor([[5]] * 4, dtype=torch.int32)],
        "top_logprobs": [x, torch.tensor([5, 0, 1, 2]), 2],
        "draw": [
            x,
            torch.ones(4),
            torch.full((4,), 5),
            torch.ones(4).double(),
            torch.zeros(4).double(),
            torch.arange(4),
        ],
        "linear": [x, torch.randn(3, 6), torch.randn(3)],
        "linear_packed": [x, *ops.pack(torch.randn(3, 6)), torch.randn(3)],
    }


@pytest.mark.parametrize("name", sorted(op_calls()))
def test_opcheck(name: str) -> None:
    op = getattr(torch.ops.multilora, name).default
    torch.library.opcheck(op, tuple(op_calls()[name]))


# Isolation: a row's bits do not depend on the rest of the batch -----------------------------------


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


exact_dtypes = pytest.mark.parametrize("dtype", DTYPES[::2])


def assert_tiles_independent(
    call: Callable[[Tensor, Tensor, Tiles], object],  # changes y of (y, x, tiles)
    y: Tensor,
    x: Tensor,
    slots: list[int],
) -> None:
    """Each tile alone and the tiles in reverse order give the bits of the whole batch."""
    tiles = make_tiles(slots, 16)
    whole = y.clone()
    call(whole, x, tiles)
    spans = [
        torch.arange(start, start + count)
        for start, count in zip(tiles.starts.tolist(), tiles.lens.tolist(), strict=True)
    ]
    for rows in [*spans, torch.cat(spans[::-1])]:
        part = y[rows]
        call(part, x[rows], make_tiles([slots[i] for i in rows.tolist()], 16))
        assert torch.equal(part, whole[rows])


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(
    ("in_", "starts"),
    [
        (33, (0, 15, 30, 47)),
        (256, (0, 128, 320)),
        (33, STARTS),
    ],
)
@exact_dtypes
def test_a_lora_rows_bits_are_its_own(
    dtype: torch.dtype, in_: int, starts: tuple[int, ...]
) -> None:
    case = make_case("skewed", dtype, dora=True, in_=in_, starts=starts)

    def call(y: Tensor, x: Tensor, tiles: Tiles) -> None:
        ops.lora_(y, x, case.a_pages, case.b_pages, case.table, tiles, starts)

    assert_tiles_independent(call, case.y, case.x, POPULARITY["skewed"])


@pytest.mark.usefixtures("threads")
@exact_dtypes
def test_an_embedding_rows_bits_are_its_own(dtype: torch.dtype) -> None:
    y, ids, a_pages, b_pages, table, _ = make_embedding("uniform", dtype)

    def call(y: Tensor, ids: Tensor, tiles: Tiles) -> None:
        ops.lora_embed_(y, ids, a_pages, b_pages, table, tiles)

    assert_tiles_independent(call, y, ids, POPULARITY["uniform"])


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("group", [1, 4])
@exact_dtypes
def test_a_sequences_attention_bits_are_its_own(dtype: torch.dtype, group: int) -> None:
    (q, k_blocks, v_blocks, table, lens, starts), kwargs = make_attention(MIXED, dtype, group)
    whole = attend([q, k_blocks, v_blocks, table, lens, starts], kwargs)
    spans = [torch.arange(int(starts[i]), int(starts[i + 1])) for i in range(len(lens))]
    backwards = list(range(len(lens)))[::-1]
    for members in [*([i] for i in backwards), backwards]:
        rows = torch.cat([spans[i] for i in members])
        few = torch.tensor([0, *(len(spans[i]) for i in members)]).cumsum(0).int()
        part = attend([q[rows], k_blocks, v_blocks, table[members], lens[members], few], kwargs)
        assert torch.equal(part, whole[rows])


ROW_OPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu_mul": lambda x, _: ops.silu_mul(x),
    "rms_norm": lambda x, weight: ops.rms_norm(x, weight[0], 1e-5),
    "linear": lambda x, weight: ops.linear(x, weight),
}


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("name", ROW_OPS)
@pytest.mark.parametrize("width", [34, 320])
@exact_dtypes
def test_bits_of_sixteen_rows_are_their_own(name: str, dtype: torch.dtype, width: int) -> None:
    call = ROW_OPS[name]
    x, weight = torch.randn(128, width).to(dtype), torch.randn(47, width).to(dtype)
    whole = call(x, weight)
    for rows in [*torch.arange(128).split(16), torch.arange(128).flip(0)]:
        assert torch.equal(call(x[rows], weight), whole[rows])


# Mistakes -----------------------------------------------------------------------------------------


def f(*shape: int) -> Tensor:
    return torch.zeros(shape)


TABLE = Table(*(torch.zeros(shape, dtype=torch.int32) for shape in ((1, 1), (1, 1), (1,))))
NONE = make_tiles([], 16)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: ops.lora_shrink(f(2, 3), f(1, 1, 8, 4), TABLE, NONE), "3 columns"),
        (lambda: ops.lora_shrink(f(2, 3), f(1, 8, 3), TABLE, NONE), "must be"),
        (lambda: ops.lora_shrink(f(2, 3), f(1, 1, 8, 3), TABLE, NONE, 4), "split_k 4"),
        (lambda: ops.lora_shrink(f(2, 3), f(1, 1, 8, 3), TABLE, NONE, 0), "split_k 0"),
        (lambda: ops.lora_expand_(f(2, 5), f(1, 2, 8), f(1, 8, 4), TABLE, NONE, (0, 5)), "b_pages"),
        (lambda: ops.lora_expand_(f(2, 5), f(1, 2, 8), f(1, 8, 5), TABLE, NONE, (0, 4)), "span"),
        (lambda: ops.lora_head_(f(2, 5), f(3, 3), f(1, 1, 8, 3), f(1, 8, 5), TABLE, NONE), "rows"),
        (
            lambda: ops.lora_head_(f(2, 5), f(2, 3), f(1, 2, 8, 3), f(1, 8, 5), TABLE, NONE),
            "slices",
        ),
        (
            lambda: ops.lora_head_(f(2, 5), f(2, 3), f(1, 1, 7, 3), f(1, 8, 5), TABLE, NONE),
            "slices, 8, in",
        ),
        (
            lambda: ops.lora_head_(f(2, 5), f(2, 3), f(1, 1, 8, 3), f(1, 7, 5), TABLE, NONE),
            "pages, 8, out",
        ),
        (
            lambda: ops.lora_(
                f(2, 5), f(2, 3), f(1, 3, 8, 3), f(1, 8, 5), TABLE, NONE, (0, 4, 3, 5)
            ),
            "fall",
        ),
        (lambda: ops.lora_embed_(f(2, 5), f(3), f(1, 9, 8), f(1, 8, 5), TABLE, NONE), "rows"),
        (lambda: ops.lora_embed_(f(2, 5), f(2), f(1, 9, 7), f(1, 8, 5), TABLE, NONE), "vocab, 8"),
        (lambda: attend([f(2, 3, 4), *[f(1, 8, 2, 4)] * 2, *[f(0)] * 3], {"scale": 1.0}), "heads"),
        (lambda: ops.rope_store_kv_(f(2, 3, 4), f(1), f(1), f(9, 4), *[f(1)] * 5), "head_dim"),
        (lambda: ops.rope_store_kv_(f(2, 3, 4), f(1), f(1), f(9, 2), *[f(1)] * 6), "together"),
        (lambda: ops.rope_store_kv_(f(2, 3, 4), f(1), f(1), f(9, 2), *[f(1)] * 5), "tokens"),
        (lambda: ops.rms_norm(f(2, 3), f(4), 1e-5), "weight"),
        (lambda: ops.silu_mul(f(2, 3)), "even"),
        (lambda: ops.apply_token_mask_(f(2, 33), f(2, 2)), "int32"),
        (lambda: ops.apply_token_mask_(f(2, 33), f(2, 1).int()), "vocab"),
        (lambda: ops.linear(f(2, 3), f(5, 4)), "3 columns"),
    ],
)
def test_shapes_that_disagree_raise(call: Callable[[], object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        call()
