"""Tokens as bytes, and special ones as strings to find in text."""

from __future__ import annotations

import pytest

from multilora.tokenization.vocabulary import AddedToken, AddedTokenFinder, Vocabulary

TABLE = {0: b" a", 1: b"b", 2: "é".encode()[:1], 3: "é".encode()[1:]}
SPECIALS = {4: AddedToken("<s>", special=True), 6: AddedToken("<s>x", special=True)}


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


def always(*_: object) -> bool:
    return True


def test_the_longest_of_the_leftmost_is_found() -> None:
    finder = AddedTokenFinder(SPECIALS)
    assert finder.split("a<s>xb<s>", always) == ["a", 6, "b", 4]
    assert finder.split("<S>", always) == ["<S>"]  # by case
    assert finder.split("", always) == []
    assert AddedTokenFinder({}).split("<s>", always) == ["<s>"]


def test_what_is_denied_is_plain_text() -> None:
    finder = AddedTokenFinder(SPECIALS)
    assert finder.split("<s>a<s>", lambda token, start, stop: start > 0) == ["<s>a", 4]


@pytest.mark.parametrize(
    ("flags", "text", "parts"),
    [
        ({"lstrip": True}, "a  <t> b", ["a", 9, " b"]),
        ({"rstrip": True}, "a  <t> b", ["a  ", 9, "b"]),
        ({"lstrip": True, "rstrip": True}, "  <t>  ", [9]),
        ({"single_word": True}, "a<t> <t>", ["a<t> ", 9]),
    ],
)
def test_flags_take_spaces_and_words(
    flags: dict[str, bool], text: str, parts: list[int | str]
) -> None:
    assert AddedTokenFinder({9: AddedToken("<t>", **flags)}).split(text, always) == parts
