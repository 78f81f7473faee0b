"""What callers give: numbers of other libraries are taken, what cannot be read is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from multilora.arguments import flag, folder, is_int, is_number, items, plain, read
from multilora.errors import ConfigError, RequestError
from tests.harness.hostile_values import made


@pytest.mark.parametrize(
    ("given", "expected"),
    [(np.int64(3), 3), (torch.tensor(2.5), 2.5), (np.bool_(True), True), (np.array(4), 4)],
)
def test_a_number_of_numpy_or_torch_is_pythons(given: Any, expected: Any) -> None:
    assert plain(given) == expected
    assert type(plain(given)) is type(expected)


def test_anything_else_stays_what_it_is() -> None:
    for value in ("x", [1], np.array([1]), made("RaisesOnShape()"), int):
        assert plain(value) is value


def test_a_bool_is_no_number_and_a_nan_is_none() -> None:
    assert is_int(3)
    assert not is_int(True)
    assert is_number(3)
    assert is_number(0.5)
    assert not any(map(is_number, (True, float("nan"), float("inf"), "1", None)))


def test_a_flag_is_true_or_false_and_nothing_that_is_like_it() -> None:
    assert flag(np.bool_(True), "echo") is True
    assert flag(False, "echo") is False
    for value in (1, None, "yes", np.array([1, 2]), made("Raises()")):
        with pytest.raises(RequestError, match="echo must be True or False"):
            flag(value, "echo")


def test_what_raises_when_it_is_read_is_a_request_error() -> None:
    assert read(list, (1, 2), "it") == [1, 2]
    for make, spelled in (
        (list, "Raises()"),
        (len, "TrappedList([1])"),
        (dict, "RaisingDict(a=1)"),
    ):
        with pytest.raises(RequestError, match="it cannot be read"):
            read(make, made(spelled), "it")


def test_items_are_those_of_a_list_of_known_length() -> None:
    assert items(None, "it") == ()
    assert items(torch.tensor([1, 2]), "it") == (1, 2)
    assert items({3}, "it") == (3,)
    for value in ("ab", b"ab", {"a": 1}, 5, iter([1]), list):
        with pytest.raises(RequestError, match="it must be a list"):
            items(value, "it")
    with pytest.raises(RequestError, match="it may have at most 3 entries, not 1099511627776"):
        items(range(2**40), "it", 3)


def test_a_folder_may_be_missing_but_must_be_one_that_could_be(tmp_path: Path) -> None:
    assert folder(tmp_path, "model", ConfigError) == str(tmp_path)
    assert folder("/nonexistent", "model", ConfigError) == "/nonexistent"
    for value in (None, 5, b"/", "x" * 300, "a\x00b", "\ud800"):
        with pytest.raises(ConfigError, match="model"):
            folder(value, "model", ConfigError)
