"""Tokens as bytes, and special ones as strings to find in text."""

from __future__ import annotations

import pytest

from multilora.tokenization.vocabulary import Specials, Vocabulary

TABLE = {0: b" a", 1: b"b", 2: "é".encode()[:1], 3: "é".encode()[1:]}
SPECIALS = {"<s>": 4, "<s>x": 6}


def test_ids_are_bytes_that_make_a_text_together() -> None:
    vocabulary = Vocabulary(TABLE, SPECIALS)
    assert vocabulary.size == 7
    assert vocabulary.decode([0, 1, 2, 3], skip_special_tokens=True) == " abé"
    assert vocabulary.decode([2, 1], skip_special_tokens=True) == "\N{REPLACEMENT CHARACTER}b"


def test_special_ids_are_shown_or_skipped() -> None:
    vocabulary = Vocabulary(TABLE, SPECIALS)
    assert vocabulary.decode([1, 4, 1], skip_special_tokens=True) == "bb"
    assert vocabulary.decode([1, 4, 1], skip_special_tokens=False) == "b<s>b"


def test_ids_that_are_none_have_no_text() -> None:
    vocabulary = Vocabulary(TABLE, SPECIALS)
    assert vocabulary.decode([-1, 5, 7, 1], skip_special_tokens=False) == "b"


def test_the_first_space_may_not_be_the_texts_own() -> None:
    stripped = Vocabulary({**TABLE, 7: b" "}, SPECIALS, strip_space=True)
    assert stripped.decode([0, 0], skip_special_tokens=True) == "a a"
    assert stripped.decode([7, 7, 0], skip_special_tokens=True) == "  a"  # one of three spaces


def test_the_longest_special_token_is_found_first() -> None:
    specials = Specials(SPECIALS)
    assert specials.split("a<s>xb<s>") == ["a", 6, "b", 4]
    assert specials.split("<S>") == ["<S>"]  # by case
    assert specials.split("") == []
    assert Specials({}).split("<s>") == ["<s>"]


@pytest.mark.parametrize(
    ("text", "broken"),
    [
        ("a<s>b", "a<|s>b"),
        ("<S>X", "<|S>X"),  # a template may lower what it is given
        ("end <s ", "end <|s "),  # another string could complete it
        ("end <", "end <|"),
        ("none", "none"),
    ],
)
def test_a_special_token_in_a_text_is_broken(text: str, broken: str) -> None:
    assert Specials(SPECIALS).break_in(text, "|") == broken
    assert Specials({}).break_in(text, "|") == text
