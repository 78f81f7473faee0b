"""Paged attention in the interpreter, under the guard, against `reference` in float64."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from multilora_kernels import reference
from multilora_kernels.cuda import attention, attention_segments
from multilora_kernels.testing.guard import guarded

TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2.5e-2}
FP8 = torch.float8_e4m3fn
UNIT = 64  # tokens of a segment: two KV tiles of fp32, one of 16-bit types
# (tokens of this step, tokens in the cache): prompts, chunks, single tokens, an absent sequence.
MIXED = [(5, 5), (1, 1), (17, 70), (0, 0), (1, 65), (1, 130), (40, 64), (1, 64)]
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype)[6:])
modes = pytest.mark.parametrize("batch_invariant", [False, True], ids=["fast", "invariant"])


class Case(NamedTuple):
    """The tensors of `paged_attention`, in its order."""

    q: Tensor
    k_blocks: Tensor
    v_blocks: Tensor
    block_table: Tensor
    seq_lens: Tensor
    query_starts: Tensor


def make(
    lengths: list[tuple[int, int]],
    dtype: torch.dtype,
    *,
    group: int = 2,
    block_size: int = 16,
    kv_dtype: torch.dtype | None = None,
    kv_heads: int = 2,
    head_dim: int = 16,
) -> Case:
    """Blocks of NaN but for the live tokens, q a view of a wider tensor, gaps between blocks."""
    counts = [-(-length // block_size) for _, length in lengths]
    order = (torch.randperm(sum(counts)) + 1).tolist()
    numel = block_size * kv_heads * head_dim
    pages = torch.full((2, sum(counts) + 2, numel + 32), torch.nan)[..., 16 : 16 + numel]
    pages = pages.unflatten(2, (block_size, kv_heads, head_dim))
    table = torch.zeros(len(lengths), max([0, *counts]) + 1, dtype=torch.int32)
    for i, (_, length) in enumerate(lengths):
        for j in range(counts[i]):
            block = table[i, j] = order.pop()
            live = min(block_size, length - j * block_size)
            pages[:, block, :live] = torch.randn(2, live, kv_heads, head_dim)
    starts = torch.tensor([0, *(count for count, _ in lengths)]).cumsum(0).int()
    fused = torch.randn(int(starts[-1]), kv_heads * (group + 2), head_dim).to(dtype)
    seq_lens = torch.tensor([length for _, length in lengths], dtype=torch.int32)
    k_blocks, v_blocks = pages.to(kv_dtype or dtype)
    return Case(fused[:, : kv_heads * group], k_blocks, v_blocks, table, seq_lens, starts)


def attend(case: Case, batch_invariant: bool, *, order: int = 0, **options: Any) -> Tensor:
    """The kernels' result; the maxima are those of the case unless given."""
    counts = (case.query_starts[1:] - case.query_starts[:-1]).tolist()
    given: dict[str, Any] = {"max_query_len": max(counts, default=1)}
    given["max_seq_len"] = max([1, *case.seq_lens.tolist()])
    given |= {"scale": case.q.shape[2] ** -0.5, "sm": 90, "unit": UNIT} | options
    with guarded(order=order):
        return attention.paged_attention(*case, batch_invariant=batch_invariant, **given)


def expected(case: Case, **scales: Tensor) -> Tensor:
    q, k_blocks, v_blocks = (t.double() for t in case[:3])
    return reference.paged_attention(
        q, k_blocks, v_blocks, *case[3:], scale=case.q.shape[2] ** -0.5, **scales
    )


def assert_close(found: Tensor, want: Tensor) -> None:
    tolerance = TOLERANCE[found.dtype]
    torch.testing.assert_close(found.double(), want, rtol=tolerance, atol=tolerance)


@modes
@dtypes
def test_mixed_batch(dtype: torch.dtype, batch_invariant: bool) -> None:
    case = make(MIXED, dtype)
    assert_close(attend(case, batch_invariant), expected(case))


@pytest.mark.parametrize(
    ("group", "block_size", "head_dim"), [(1, 16, 64), (3, 128, 16), (4, 32, 128), (8, 64, 64)]
)
@modes
def test_shapes(batch_invariant: bool, group: int, block_size: int, head_dim: int) -> None:
    shape = {"group": group, "block_size": block_size, "head_dim": head_dim}
    case = make([(17, 50), (1, 70), (0, 0), (1, 1)], torch.bfloat16, kv_heads=1, **shape)
    assert_close(attend(case, batch_invariant), expected(case))


@modes
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_e4m3_pages_with_a_scale_for_each_head(dtype: torch.dtype, batch_invariant: bool) -> None:
    case = make(MIXED[:6], dtype, group=4, kv_dtype=FP8, head_dim=32)
    scales = {"k_scale": torch.tensor([0.5, 2.0]), "v_scale": torch.tensor([1.5, 0.25])}
    assert_close(attend(case, batch_invariant, **scales), expected(case, **scales))


@modes
def test_more_query_heads_than_rows_of_a_tile(batch_invariant: bool) -> None:
    case = make([(3, 20), (1, 33)], torch.bfloat16, group=20, kv_heads=1)
    assert_close(attend(case, batch_invariant), expected(case))


@modes
def test_segments_grow_with_the_position(batch_invariant: bool) -> None:
    length = 2 * attention_segments.OCTAVE * UNIT + 200  # beyond where lengths double
    case = make([(1, length), (9, length - 40)], torch.float16, kv_heads=1)
    assert_close(attend(case, batch_invariant), expected(case))


@pytest.mark.parametrize("unit", [64, 512])
def test_segments_cover_every_position_once(unit: int) -> None:
    starts = [0]
    for segment in range(200):
        length = unit << max(segment // attention_segments.OCTAVE - 1, 0)
        assert attention_segments.count_segments(starts[-1] + 1, unit) == segment + 1
        assert attention_segments.count_segments(starts[-1] + length, unit) == segment + 1
        starts.append(starts[-1] + length)
    assert attention_segments.count_segments(131_072, 512) == 80


@modes
@pytest.mark.parametrize("programs", [1, 2, 5])
def test_how_many_programs_share_the_segments_changes_no_bit(
    batch_invariant: bool, programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make([(1, 700), (3, 300), (0, 0), (1, 64)], torch.bfloat16, kv_heads=1)
    whole = attend(case, batch_invariant)
    monkeypatch.setattr(attention, "split_programs", lambda most, kv_heads: programs)
    assert torch.equal(attend(case, batch_invariant), whole)


def test_a_longer_context_needs_no_more_programs() -> None:
    counts = [attention_segments.count_segments(n, 512) for n in (512, 8192, 131_072)]
    assert [attention_segments.split_programs(1 * n, 8) for n in counts] == [1, 16, 64]
    assert [attention_segments.split_programs(64 * n, 8) for n in counts] == [64, 64, 64]


@modes
def test_nothing_to_do(batch_invariant: bool) -> None:
    none = make([], torch.float16)
    assert attend(none, batch_invariant).shape == (0, 4, 16)
    rows = none._replace(q=torch.randn(3, 4, 16).half())
    assert (attend(rows, batch_invariant) == 0).all()
    idle = make([(0, 0), (0, 7)], torch.float16)._replace(q=torch.randn(3, 4, 16).half())
    assert (attend(idle, batch_invariant) == 0).all()


@modes
def test_rows_of_no_sequence_are_zero(batch_invariant: bool) -> None:
    case = make([(3, 3), (1, 20)], torch.float32)
    longer = case._replace(q=torch.cat((case.q, torch.full((40, 4, 16), torch.nan))))
    found = attend(longer, batch_invariant)
    assert (found[4:] == 0).all()
    assert torch.equal(found[:4], attend(case, batch_invariant))


# Bits ---------------------------------------------------------------------------------------------


def of_sequences(case: Case, members: list[int], empty: int = 0) -> tuple[Case, Tensor]:
    """The case of some of its sequences in that order and `empty` more; the rows they come from."""
    starts = case.query_starts.tolist()
    spans = [torch.arange(starts[i], starts[i + 1]) for i in members]
    counts = [0, *map(len, spans), *[0] * empty]
    table = torch.cat((case.block_table[members], case.block_table[:1].expand(empty, -1)))
    lens = torch.cat((case.seq_lens[members], torch.zeros(empty, dtype=torch.int32)))
    rows = torch.cat(spans)
    part = case._replace(
        q=case.q[rows],
        block_table=table,
        seq_lens=lens,
        query_starts=torch.tensor(counts).cumsum(0).int(),
    )
    return part, rows


@modes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sequences_bits_are_its_own(dtype: torch.dtype, batch_invariant: bool) -> None:
    case = make(MIXED, dtype, group=4)
    whole = attend(case, batch_invariant)
    assert torch.equal(attend(case, batch_invariant, order=1), whole)
    wide = {"max_query_len": 64, "max_seq_len": 1100}  # a larger bucket
    assert torch.equal(attend(case, batch_invariant, **wide), whole)
    for members, empty in (([7, 4, 2, 0, 6, 5, 1, 3], 0), ([5], 0), ([2], 3), ([1, 7, 4], 5)):
        part, rows = of_sequences(case, members, empty)
        assert torch.equal(attend(part, batch_invariant), whole[rows])


@pytest.mark.parametrize("chunks", [[1] * 40, [7, 1, 3, 1, 1, 20, 2, 5]], ids=["tokens", "mixed"])
def test_invariant_bits_do_not_depend_on_chunks(chunks: list[int]) -> None:
    """One 16-bit row alone, in a short chunk or in a long one: split and chunk form agree."""
    case = make([(40, 170)], torch.bfloat16, group=4, kv_heads=1)
    whole, done, before = attend(case, True), 0, 130
    for count in chunks:
        part = case._replace(
            q=case.q[done : done + count],
            seq_lens=torch.tensor([before + count], dtype=torch.int32),
            query_starts=torch.tensor([0, count], dtype=torch.int32),
        )
        assert torch.equal(attend(part, True), whole[done : done + count])
        done, before = done + count, before + count


# Mistakes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "sm", "match"),
    [
        ({"head_dim": 48}, 90, "wants one of"),
        ({"head_dim": 256}, 90, "wants one of"),
        ({"kv_dtype": torch.float32}, 90, "KV blocks are torch.float32"),
        ({"kv_dtype": FP8}, 80, "sm_80 has no e4m3"),
    ],
)
def test_what_it_cannot_do_raises(change: dict[str, Any], sm: int, match: str) -> None:
    case = make([(1, 3)], torch.float16, **change)
    with pytest.raises(ValueError, match=match):
        attend(case, False, sm=sm)


def test_columns_must_be_contiguous() -> None:
    case = make([(1, 3)], torch.float16)
    turned = case._replace(k_blocks=case.k_blocks.transpose(2, 3))
    with pytest.raises(ValueError, match="contiguous"):
        attend(turned, False)
