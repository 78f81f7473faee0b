"""Paged attention in the interpreter, under the guard, against `reference` in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from multilora_kernels import reference
from multilora_kernels.cuda import attention, attention_segments
from multilora_kernels.testing.guard import guarded
from multilora_kernels.testing.precision import assert_close
from tests.harness.kernel_calls.attention import (
    MIXED,
    AttentionCall,
    make_attention_call,
    of_sequences,
)
from tests.harness.kernel_calls.dtypes import by_dtype

FP8 = torch.float8_e4m3fn
UNIT = 64  # tokens of a segment: two KV tiles of fp32, one of 16-bit types
modes = pytest.mark.parametrize("batch_invariant", [False, True], ids=["fast", "invariant"])


def attend(call: AttentionCall, batch_invariant: bool, *, order: int = 0, **options: Any) -> Tensor:
    """The kernels' result; the maxima are those of the call unless given."""
    counts = (call.query_starts[1:] - call.query_starts[:-1]).tolist()
    given: dict[str, Any] = {"max_query_len": max(counts, default=1)}
    given["max_seq_len"] = max([1, *call.seq_lens.tolist()])
    given |= {"scale": call.scale, "sm": 90, "unit": UNIT} | options
    with guarded(order=order):
        return attention.paged_attention(*call, batch_invariant=batch_invariant, **given)


def expected(call: AttentionCall, **scales: Tensor) -> Tensor:
    q, k_blocks, v_blocks = (t.double() for t in call[:3])
    return reference.paged_attention(q, k_blocks, v_blocks, *call[3:], scale=call.scale, **scales)


@modes
@by_dtype
def test_mixed_batch(dtype: torch.dtype, batch_invariant: bool) -> None:
    call = make_attention_call(MIXED, dtype)
    assert_close(attend(call, batch_invariant), expected(call))


@pytest.mark.parametrize(
    ("group", "block_size", "head_dim"), [(1, 16, 64), (3, 128, 16), (4, 32, 128), (8, 64, 64)]
)
@modes
def test_shapes(batch_invariant: bool, group: int, block_size: int, head_dim: int) -> None:
    shape = {"group": group, "block_size": block_size, "head_dim": head_dim}
    call = make_attention_call(
        [(17, 50), (1, 70), (0, 0), (1, 1)], torch.bfloat16, kv_heads=1, **shape
    )
    assert_close(attend(call, batch_invariant), expected(call))


@modes
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_e4m3_pages_with_a_scale_for_each_head(dtype: torch.dtype, batch_invariant: bool) -> None:
    call = make_attention_call(MIXED[:6], dtype, group=4, kv_dtype=FP8, head_dim=32)
    scales = {"k_scale": torch.tensor([0.5, 2.0]), "v_scale": torch.tensor([1.5, 0.25])}
    assert_close(attend(call, batch_invariant, **scales), expected(call, **scales))


@modes
def test_more_query_heads_than_rows_of_a_tile(batch_invariant: bool) -> None:
    call = make_attention_call([(3, 20), (1, 33)], torch.bfloat16, group=20, kv_heads=1)
    assert_close(attend(call, batch_invariant), expected(call))


@modes
def test_segments_grow_with_the_position(batch_invariant: bool) -> None:
    length = 2 * attention_segments.OCTAVE * UNIT + 200  # beyond where lengths double
    call = make_attention_call([(1, length), (9, length - 40)], torch.float16, kv_heads=1)
    assert_close(attend(call, batch_invariant), expected(call))


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
    call = make_attention_call([(1, 700), (3, 300), (0, 0), (1, 64)], torch.bfloat16, kv_heads=1)
    whole = attend(call, batch_invariant)
    monkeypatch.setattr(attention, "split_programs", lambda most, kv_heads: programs)
    assert torch.equal(attend(call, batch_invariant), whole)


def test_a_longer_context_needs_no_more_programs() -> None:
    counts = [attention_segments.count_segments(n, 512) for n in (512, 8192, 131_072)]
    assert [attention_segments.split_programs(1 * n, 8) for n in counts] == [1, 16, 64]
    assert [attention_segments.split_programs(64 * n, 8) for n in counts] == [64, 64, 64]


@modes
def test_nothing_to_do(batch_invariant: bool) -> None:
    none = make_attention_call([], torch.float16)
    assert attend(none, batch_invariant).shape == (0, 4, 16)
    rows = none._replace(q=torch.randn(3, 4, 16).half())
    assert (attend(rows, batch_invariant) == 0).all()
    idle = make_attention_call([(0, 0), (0, 7)], torch.float16)._replace(
        q=torch.randn(3, 4, 16).half()
    )
    assert (attend(idle, batch_invariant) == 0).all()


@modes
def test_rows_of_no_sequence_are_zero(batch_invariant: bool) -> None:
    call = make_attention_call([(3, 3), (1, 20)], torch.float32)
    longer = call._replace(q=torch.cat((call.q, torch.full((40, 4, 16), torch.nan))))
    found = attend(longer, batch_invariant)
    assert (found[4:] == 0).all()
    assert torch.equal(found[:4], attend(call, batch_invariant))


# Bits ---------------------------------------------------------------------------------------------


@modes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sequences_bits_are_its_own(dtype: torch.dtype, batch_invariant: bool) -> None:
    call = make_attention_call(MIXED, dtype, group=4)
    whole = attend(call, batch_invariant)
    assert torch.equal(attend(call, batch_invariant, order=1), whole)
    wide = {"max_query_len": 64, "max_seq_len": 1100}  # a larger bucket
    assert torch.equal(attend(call, batch_invariant, **wide), whole)
    for members, empty in (([7, 4, 2, 0, 6, 5, 1, 3], 0), ([5], 0), ([2], 3), ([1, 7, 4], 5)):
        part, rows = of_sequences(call, members, empty)
        assert torch.equal(attend(part, batch_invariant), whole[rows])


@pytest.mark.parametrize("chunks", [[1] * 40, [7, 1, 3, 1, 1, 20, 2, 5]], ids=["tokens", "mixed"])
def test_invariant_bits_do_not_depend_on_chunks(chunks: list[int]) -> None:
    """One 16-bit row alone, in a short chunk or in a long one: split and chunk form agree."""
    call = make_attention_call([(40, 170)], torch.bfloat16, group=4, kv_heads=1)
    whole, done, before = attend(call, True), 0, 130
    for count in chunks:
        part = call._replace(
            q=call.q[done : done + count],
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
    call = make_attention_call([(1, 3)], torch.float16, **change)
    with pytest.raises(ValueError, match=match):
        attend(call, False, sm=sm)


def test_columns_must_be_contiguous() -> None:
    call = make_attention_call([(1, 3)], torch.float16)
    turned = call._replace(k_blocks=call.k_blocks.transpose(2, 3))
    with pytest.raises(ValueError, match="contiguous"):
        attend(turned, False)
