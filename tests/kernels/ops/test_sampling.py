"""Token masks bit by bit; `top_logprobs` against a sort in Python and a log-softmax in float64."""

from __future__ import annotations

import math
from bisect import bisect_left
from typing import TYPE_CHECKING

import pytest
import torch

import multilora_kernels as mk
from multilora_kernels import reference

if TYPE_CHECKING:
    from torch import Tensor

NAN, INF = math.nan, math.inf
pytestmark = pytest.mark.usefixtures("form")  # each instruction set, and torch

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])


def assert_right(logits: Tensor, targets: list[int], top: int) -> None:
    ids, logprobs, ranks = mk.top_logprobs(logits, torch.tensor(targets).long(), top)
    assert (ids.dtype, logprobs.dtype, ranks.dtype) == (torch.int64, torch.float32, torch.int64)
    for i, (row, target) in enumerate(zip(logits.double(), targets, strict=True)):
        values = row.tolist()
        order = sorted(range(len(values)), key=lambda j: (-values[j], j))
        assert ids[i].tolist() == [target, *order[:top]]
        falling = [-values[j] for j in order]
        assert ranks[i].tolist() == [1 + bisect_left(falling, -values[j]) for j in ids[i]]
        expected = row.log_softmax(-1)[ids[i]].float()
        torch.testing.assert_close(logprobs[i], expected, rtol=1e-6, atol=3e-6)


@dtypes
@pytest.mark.parametrize("vocab", [1, 7, 16, 255, 257, 3001])
def test_ids_logprobs_and_ranks(dtype: torch.dtype, vocab: int) -> None:
    logits = torch.randn(3, vocab).mul_(3).to(dtype)
    for top in (0, 1, 5, 300):
        assert_right(logits, [0, vocab // 2, vocab - 1], min(top, vocab))


def test_top_is_cut_to_the_vocabulary() -> None:
    ids, logprobs, ranks = mk.top_logprobs(torch.zeros(2, 3), torch.tensor([2, 0]), 9)
    assert ids.tolist() == [[2, 0, 1, 2], [0, 0, 1, 2]]
    assert ranks.eq(1).all()
    torch.testing.assert_close(logprobs, torch.full((2, 4), -math.log(3)))


@dtypes
def test_equal_logits_go_by_id(dtype: torch.dtype) -> None:
    logits = torch.zeros(1, 1000).to(dtype)
    logits[0, 1::2] = -0.0
    logits[0, 700:] = 1
    assert_right(logits, [999], 5)
    assert_right(logits[:, :700], [699], 5)
    assert_right(torch.arange(1000.0).to(dtype)[None], [0], 20)  # each in front of all before it


def test_infinite_and_masked_logits() -> None:
    logits = torch.randn(1, 300)
    logits[0, ::2] = -INF
    assert_right(logits, [0], 200)
    for value in (INF, -INF):
        row = torch.full((1, 300), -INF)
        row[0, 40] = value
        ids, logprobs, _ = mk.top_logprobs(row, torch.tensor([3]), 2)
        assert ids[0, 1] == (40 if value > 0 else 0)
        assert logprobs.isnan().all()


@pytest.mark.parametrize("where", [0, 40, 299])
def test_nan_is_the_likeliest_and_every_logprob_is_nan(where: int) -> None:
    logits = torch.randn(2, 300)
    logits[1, where] = NAN
    ids, logprobs, ranks = mk.top_logprobs(logits, torch.tensor([7, 7]), 3)
    assert ids[1, 1] == where
    assert logprobs[1].isnan().all()
    assert not logprobs[0].isnan().any()
    assert torch.equal(ranks, reference.top_logprobs(logits, torch.tensor([7, 7]), 3)[2])


@dtypes
def test_a_rows_bits_are_its_own(dtype: torch.dtype) -> None:
    wide = torch.randn(33, 1500).to(dtype)
    logits, targets = wide[:, 3:1004], torch.randint(1001, (33,))
    whole = mk.top_logprobs(logits, targets, 4)
    for rows in [torch.tensor([32]), torch.arange(5, 21), torch.arange(33).flip(0)]:
        part = mk.top_logprobs(logits[rows], targets[rows], 4)
        for found, expected in zip(part, whole, strict=True):
            assert torch.equal(found, expected[rows])


@pytest.mark.parametrize("target", [-1, -(2**63), 300, 2**32, 2**63 - 1])
def test_a_target_outside_of_the_vocabulary_is_refused(target: int) -> None:
    with pytest.raises(IndexError, match="vocabulary"):
        mk.top_logprobs(torch.zeros(2, 300), torch.tensor([0, target]), 2)


def test_nothing_gives_nothing() -> None:
    for found in mk.top_logprobs(torch.zeros(0, 5), torch.zeros(0).long(), 2):
        assert found.shape == (0, 3)


@pytest.mark.parametrize(("rows", "top"), [(1, 2), (2, -1)])
def test_mistakes_raise(rows: int, top: int) -> None:
    with pytest.raises(ValueError, match=r"targets|negative"):
        mk.top_logprobs(torch.zeros(2, 5), torch.zeros(rows).long(), top)


# Token masks --------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("vocab", [1, 31, 32, 33, 1000])
@pytest.mark.parametrize("rows", [0, 1, 7])
def test_a_mask_sets_minus_infinity_exactly_where_the_bit_is_0(
    rows: int, vocab: int, dtype: torch.dtype
) -> None:
    words = (vocab + 31) // 32
    logits = torch.randn(rows, vocab + 5).to(dtype)[:, :vocab]  # rows are not contiguous
    mask = torch.randint(-(2**31), 2**31, (rows, words + 2), dtype=torch.int32)[:, 1 : words + 1]
    mask[:, ::3] = -1  # whole words allowed
    bits = torch.arange(vocab)
    allowed = (mask[:, bits // 32] >> (bits % 32) & 1).bool()
    want = logits.masked_fill(~allowed, -INF)
    mk.apply_token_mask_(logits, mask)
    assert torch.equal(logits, want)


def test_a_mask_writes_nothing_outside_of_the_vocabulary() -> None:
    whole = torch.zeros(3, 40)
    mk.apply_token_mask_(whole[:, :33], torch.zeros(3, 2, dtype=torch.int32))
    assert whole[:, :33].eq(-INF).all()
    assert whole[:, 33:].eq(0).all()


@pytest.mark.parametrize(
    ("mask", "match"), [(torch.zeros(2, 2), "int32"), (torch.zeros(2, 1).int(), "vocab")]
)
def test_a_mask_of_another_type_or_shape_raises(mask: Tensor, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        mk.apply_token_mask_(torch.zeros(2, 33), mask)
