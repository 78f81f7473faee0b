"""Errors: which builtin ones they are as well, and that each says its text."""

from __future__ import annotations

import pytest

from multilora import errors


def test_they_can_be_caught_as_the_builtin_errors_that_they_are() -> None:
    for error in (errors.ConfigError, errors.AdapterInvalid, errors.RequestError):
        assert issubclass(error, ValueError)
    for error in (errors.EngineBusyError, errors.EngineDeadError):
        assert issubclass(error, RuntimeError)
    assert issubclass(errors.AdapterNotFound, KeyError)


@pytest.mark.parametrize(
    "name",
    [
        "AdapterNotFound",
        "AdapterInvalid",
        "AdapterTooLarge",
        "AdapterUnavailable",
        "RequestError",
        "ConfigError",
    ],
)
def test_the_text_is_what_it_was_given(name: str) -> None:
    assert str(getattr(errors, name)("no 'x' here")) == "no 'x' here"  # not its repr
    assert str(getattr(errors, name)()) == ""
