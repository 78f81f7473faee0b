"""Paged attention on a CPU against `reference` and torch's own; a sequence's bits are its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import multilora_kernels as mk
from multilora_kernels import reference
from multilora_kernels.testing.precision import assert_close, to_float64
from tests.harness.kernel_calls.attention import (
    MIXED,
    AttentionCall,
    make_attention_call,
    of_sequences,
)
from tests.harness.kernel_calls.dtypes import by_dtype
from tests.harness.kernel_calls.rope import STORED, make_rope_call

SCALES = {"k_scale": torch.tensor([0.5, 2.0]), "v_scale": torch.tensor([1.5, 0.25])}


def attend(call: AttentionCall, **more: Any) -> Tensor:
    return mk.paged_attention(*call, scale=call.scale, max_query_len=64, max_seq_len=130, **more)


@pytest.mark.parametrize("scales", [{}, SCALES], ids=["plain", "scaled"])
@pytest.mark.parametrize(("group", "block_size"), [(1, 8), (2, 1), (4, 16)])
@by_dtype
def test_paged_attention(
    dtype: torch.dtype, group: int, block_size: int, scales: dict[str, Tensor]
) -> None:
    call = make_attention_call(MIXED, dtype, group=group, block_size=block_size)
    wide = to_float64(*call)
    assert_close(
        attend(call, **scales), reference.paged_attention(*wide, scale=call.scale, **scales)
    )


@pytest.mark.parametrize("head_dim", [10, 64])
@by_dtype
def test_every_head_dim(dtype: torch.dtype, head_dim: int) -> None:
    call = make_attention_call(MIXED, dtype, head_dim=head_dim)
    expected = reference.paged_attention(*to_float64(*call), scale=call.scale)
    assert_close(attend(call), expected)


@pytest.mark.parametrize(("group", "block_size"), [(1, 8), (4, 1)])
def test_paged_attention_is_torchs_attention(group: int, block_size: int) -> None:
    call = make_attention_call(MIXED, torch.float32, group=group, block_size=block_size)
    found = attend(call)
    q, k_blocks, v_blocks, table, _, starts = to_float64(*call)
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


def test_nothing_gives_nothing() -> None:
    assert attend(make_attention_call([], torch.float32)).shape == (0, 4, 16)


def test_rows_of_no_sequence_are_zero_and_out_is_filled() -> None:
    call = make_attention_call([(3, 3)], torch.float32)
    call = call._replace(q=F.pad(call.q, (0, 0, 0, 0, 0, 2), value=torch.nan))
    out = torch.full(call.q.shape, torch.nan)
    assert attend(call, out=out) is out
    assert (out[3:] == 0).all()
    assert out[:3].isfinite().all()


def test_int8_pages_are_read_as_they_were_stored() -> None:
    """Rounded to the nearest code, cut at 127; attention over them is that over their values."""
    args = make_rope_call(torch.float32)
    args[1][0] *= 1000  # beyond 127 codes
    scales = torch.tensor([0.02, 0.05]), torch.tensor([0.03, 0.01])
    plain = [t.clone() for t in args]
    mk.rope_store_kv_(*plain)
    args[7:] = [torch.zeros(blocks.shape, dtype=torch.int8) for blocks in args[7:]]
    mk.rope_store_kv_(*args, *scales)
    read = []
    for found, wide, scale in zip(args[7:], plain[7:], scales, strict=True):
        codes, wide = (t.flatten(0, 1)[STORED] for t in (found, wide))
        assert torch.equal(codes, (wide / scale[:, None]).round().clamp(-127, 127).to(torch.int8))
        read.append(found.float() * scale[:, None])
    where = torch.tensor([[0, 1]]).int(), torch.tensor([4]).int(), torch.tensor([0, 2]).int()
    grid = {"scale": 0.3, "max_query_len": 2, "max_seq_len": 4}
    q = args[0][:2]
    found = mk.paged_attention(q, *args[7:], *where, k_scale=scales[0], v_scale=scales[1], **grid)
    wide_q, *wide_read = to_float64(q, *read)
    assert_close(found, reference.paged_attention(wide_q, *wide_read, *where, scale=0.3))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("which", ["key", "value"])
def test_int8_pages_keep_what_is_not_finite(which: str, value: float) -> None:
    """Whoever sees the token's head gets NaN, as in pages of floats; nobody else does."""
    tokens, heads, dim = 70, 2, 16  # a tile and a part of one
    q, k, v = (torch.randn(tokens, heads, dim) for _ in range(3))
    (k if which == "key" else v)[66, 1, 5] = value
    cos, sin = torch.ones(tokens, dim // 2), torch.zeros(tokens, dim // 2)
    places = torch.arange(tokens)
    blocks = [torch.zeros(5, 16, heads, dim, dtype=torch.int8) for _ in range(2)]
    scale = torch.tensor([0.03, 0.03])
    mk.rope_store_kv_(q, k, v, cos, sin, places, places, *blocks, scale, scale)
    where = torch.arange(5)[None].int(), torch.tensor([tokens]).int(), torch.tensor([0, 70]).int()
    grid = {"scale": 0.3, "max_query_len": tokens, "max_seq_len": tokens}
    scales = {"k_scale": scale, "v_scale": scale}
    found = mk.paged_attention(q, *blocks, *where, **scales, **grid)
    lost = torch.zeros(tokens, heads, dtype=torch.bool)
    lost[66:, 1] = True
    assert torch.equal(found.isnan().all(-1), lost)
    assert torch.equal(found.isfinite().all(-1), ~lost)
    expected = reference.paged_attention(q, *blocks, *where, scale=0.3, **scales)
    assert torch.equal(expected.isnan().all(-1), lost)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_sequences_bits_are_its_own(dtype: torch.dtype, group: int) -> None:
    call = make_attention_call(MIXED, dtype, group=group)
    whole = attend(call)
    backwards = list(range(len(MIXED)))[::-1]
    for members in [*([i] for i in backwards), backwards]:
        part, rows = of_sequences(call, members)
        assert torch.equal(attend(part), whole[rows])


def test_heads_that_disagree_raise() -> None:
    q, blocks, index = torch.zeros(2, 3, 4), torch.zeros(1, 8, 2, 4), torch.zeros(0)
    call = AttentionCall(q, blocks, blocks, index, index, index)
    with pytest.raises(ValueError, match="heads"):
        attend(call)
    with pytest.raises(ValueError, match="one shape"):
        attend(call._replace(v_blocks=blocks[:0]))


def test_keys_and_values_of_strides_of_their_own() -> None:
    """C++ takes those of equal strides alone."""
    call = make_attention_call(MIXED, torch.float32)
    wide = torch.full((*call.v_blocks.shape[:-1], 2 * call.v_blocks.shape[-1]), torch.nan)
    views = wide[..., : call.v_blocks.shape[-1]].copy_(call.v_blocks)
    assert views.stride() != call.k_blocks.stride()
    assert_close(attend(call._replace(v_blocks=views)), attend(call))
