"""`draw` against the definition, in each instruction set, and against plain Python."""

from __future__ import annotations

import math
import random
from typing import TYPE_CHECKING

import pytest
import torch

import multilora_kernels as mk
from multilora_kernels import reference

if TYPE_CHECKING:
    from torch import Tensor

NAN, INF = math.nan, math.inf
pytestmark = pytest.mark.usefixtures("form")  # each instruction set, and torch

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
ALL = 2**40  # of top_k
LARGEST = 2**53 - 1


def settings(
    numbers: list[int],
    temperature: float = 1.0,
    top_k: int = ALL,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> list[Tensor]:
    """Arguments of `draw` after the logits: the same for all rows, but for the numbers."""
    rows = len(numbers)
    return [
        torch.full((rows,), temperature),
        torch.full((rows,), top_k),
        torch.full((rows,), top_p, dtype=torch.float64),
        torch.full((rows,), math.log(min_p) if min_p else -INF, dtype=torch.float64),
        torch.tensor(numbers, dtype=torch.int64),
    ]


def random_settings(rows: int, vocab: int, draw: random.Random) -> list[Tensor]:
    columns = zip(
        *(
            settings(
                [draw.choice((draw.getrandbits(53), draw.getrandbits(53), 0, LARGEST))],
                draw.choice((0.3, 0.8, 1.0, 1.7)),
                draw.choice((ALL, vocab, vocab - 1, 1, 7, 50)),
                draw.choice((1.0, 1.0, 0.9, 0.3, 1e-6, 0.999)),
                draw.choice((0.0, 0.0, 0.1, 1.0)),
            )
            for _ in range(rows)
        ),
        strict=True,
    )
    return [torch.cat(column) for column in columns]


def some_logits(kind: str, shape: tuple[int, int]) -> Tensor:
    noise, coin = torch.randn(shape), torch.rand(shape)
    return {
        "peaked": 4 * noise,
        "even": 0.1 * noise,
        "nearly equal": 1e-6 * noise,
        "tied": noise.round(),
        "zeros": torch.where(coin < 0.4, 0.0, torch.where(coin < 0.8, -0.0, 0.1 * noise)),
        "masked": torch.where(coin < 0.9, -INF, noise),
        "extreme": torch.where(coin < 0.5, 1e38, 3.0) * noise.sign(),
    }[kind]


KINDS = ["peaked", "even", "nearly equal", "tied", "zeros", "masked", "extreme"]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vocab", [2, 63, 64, 65, 1001, 20000])
def test_it_draws_what_the_definition_draws(dtype: torch.dtype, kind: str, vocab: int) -> None:
    torch.manual_seed(vocab)
    rows = 12 if vocab < 10_000 else 3
    logits = some_logits(kind, (rows, vocab)).to(dtype)
    each = random_settings(rows, vocab, random.Random(f"{vocab} {dtype} {kind}"))
    tokens, failed = mk.draw(logits, *each)
    assert (tokens.dtype, failed.dtype) == (torch.int64, torch.bool)
    expected = reference.draw(logits, *each)
    assert torch.equal(failed, expected[1])
    assert tokens.tolist() == expected[0].tolist()


@pytest.mark.parametrize("kind", KINDS[:-1])
@pytest.mark.parametrize("top_p", [1.0, 0.6037])
def test_it_inverts_the_cumulative_probability(kind: str, top_p: float) -> None:
    torch.manual_seed(3)
    vocab, draw = 700, random.Random(5)
    (row,) = some_logits(kind, (1, vocab))
    order = sorted(range(vocab), key=lambda i: (-float(row[i]), i))
    cumulative = row[order].double().softmax(-1).cumsum(-1)
    kept = float(cumulative[min(int((cumulative < top_p).sum()), vocab - 1)])
    numbers = [0, LARGEST, *(draw.getrandbits(53) for _ in range(200))]
    tokens, failed = mk.draw(row.expand(len(numbers), -1), *settings(numbers, top_p=top_p))
    assert not failed.any()
    for number, token in zip(numbers, tokens.tolist(), strict=True):
        target = number / 2**53 * kept
        places = [int((cumulative <= target + slack).sum()) for slack in (-1e-9, 1e-9)]
        assert token in order[places[0] : places[1] + 1]


def test_top_k_keeps_what_equals_the_last() -> None:
    logits = torch.tensor([[1.0, 2.0, 1.0, 0.0]]).expand(300, -1)
    numbers = [i * 2**53 // 300 for i in range(300)]
    assert set(mk.draw(logits, *settings(numbers, top_k=2))[0].tolist()) == {0, 1, 2}
    assert set(mk.draw(logits, *settings(numbers, top_k=1))[0].tolist()) == {1}
    assert set(mk.draw(logits, *settings(numbers, top_k=4))[0].tolist()) == {0, 1, 2, 3}


@pytest.mark.parametrize("bad", [NAN, -NAN, INF, -INF])
@pytest.mark.parametrize("where", [0, 40, 299])
def test_a_broken_row_fails_alone(bad: float, where: int) -> None:
    logits = torch.randn(3, 300)
    logits[1, slice(None) if bad == -INF else where] = bad
    tokens, failed = mk.draw(logits, *settings([2**52] * 3, top_k=50, top_p=0.9))
    assert failed.tolist() == [False, True, False]
    assert tokens[1] == 0
    tokens, failed = mk.draw(torch.full((1, 300), 3e38), *settings([0], temperature=0.5))
    assert failed.tolist() == [True]


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=lambda d: str(d)[6:])
def test_a_rows_token_is_its_own(dtype: torch.dtype) -> None:
    wide = torch.randn(33, 1500).to(dtype)
    logits, each = wide[:, 3:1004], random_settings(33, 1001, random.Random(7))
    whole = mk.draw(logits, *each)[0]
    for rows in [torch.tensor([32]), torch.arange(5, 21), torch.arange(33).flip(0)]:
        assert torch.equal(mk.draw(logits[rows], *(t[rows] for t in each))[0], whole[rows])


@pytest.mark.parametrize("number", [-1, -(2**63), 2**53, 2**63 - 1])
def test_no_number_leaves_the_vocabulary(number: int) -> None:
    tokens, _ = mk.draw(torch.randn(4, 100), *settings([number] * 4, top_p=0.9))
    assert all(0 <= token < 100 for token in tokens.tolist())


def test_nothing_gives_nothing() -> None:
    tokens, failed = mk.draw(torch.zeros(0, 5), *settings([]))
    assert tokens.shape == failed.shape == (0,)


def test_mistakes_raise() -> None:
    with pytest.raises(ValueError, match="must be"):
        mk.draw(torch.zeros(2, 5), *settings([1]))
    with pytest.raises(ValueError, match="vocab"):
        mk.draw(torch.zeros(2, 0), *settings([1, 2]))


def test_products_of_53_bit_numbers_are_exact() -> None:
    draw = random.Random(4)
    pairs = [(draw.getrandbits(52), draw.getrandbits(53)) for _ in range(2000)]
    pairs += [(2**52 + 3, 2**53 - 1), (2**52, 0), (0, 2**53 - 1), (1, 2**52)]
    found = reference.scaled(*(torch.tensor(column) for column in zip(*pairs, strict=True)))
    assert found.tolist() == [a * b >> 53 for a, b in pairs]
