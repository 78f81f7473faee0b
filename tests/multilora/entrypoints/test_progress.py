"""The bar: of requests, with the rate of their tokens, where somebody sees it."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from multilora.entrypoints.progress import Progress


class Bar:
    def __init__(self, **settings: Any) -> None:
        self.settings, self.done, self.texts, self.is_closed = settings, 0, [], False

    def set_postfix_str(self, text: str, *, refresh: bool) -> None:
        self.texts.append(text)

    def update(self, count: int) -> None:
        self.done += count

    def close(self) -> None:
        self.is_closed = True


def output(tokens: int) -> Any:
    return SimpleNamespace(outputs=[SimpleNamespace(token_ids=[1] * tokens)])


def test_a_callable_makes_the_bar() -> None:
    bars: list[Bar] = []

    def make(**settings: Any) -> Bar:
        bars.append(Bar(**settings))
        return bars[0]

    with Progress(3, make) as progress:
        for _ in range(3):
            progress.update(output(5))
    (bar,) = bars
    assert (bar.settings["total"], bar.done, bar.is_closed) == (3, 3, True)
    assert all(text.endswith(" tokens/s") for text in bar.texts)


@pytest.mark.parametrize(
    ("use", "is_terminal", "notebook", "shown"),
    [
        (True, True, False, True),
        (True, False, True, True),
        (True, False, False, False),
        (False, True, True, False),
    ],
)
def test_where_a_bar_is_shown(
    monkeypatch: pytest.MonkeyPatch, *, use: bool, is_terminal: bool, notebook: bool, shown: bool
) -> None:
    auto = pytest.importorskip("tqdm.auto")
    monkeypatch.setattr(auto, "tqdm", Bar)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal, raising=False)
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    if notebook:
        monkeypatch.setitem(sys.modules, "ipykernel", SimpleNamespace())  # type: ignore[arg-type]
    with Progress(1, use) as progress:
        progress.update(output(1))
        assert (progress._bar is not None) == shown
