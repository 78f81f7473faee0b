"""Where prompts come from, and what is said of a bad line."""

from __future__ import annotations

import io
import sys
from typing import TYPE_CHECKING

import pytest

from multilora.entrypoints.commands.prompt_source import Asked, read_prompts
from multilora.errors import RequestError

if TYPE_CHECKING:
    from pathlib import Path

LOADED = {"a": "folder", "b": "folder"}
MESSAGES = [{"role": "user", "content": "Hi"}]


class Input(io.TextIOWrapper):
    """stdin with these bytes."""

    def __init__(self, data: bytes, is_terminal: bool = False) -> None:
        super().__init__(io.BytesIO(data))
        self._is_terminal = is_terminal

    def isatty(self) -> bool:
        return self._is_terminal


def test_lines_of_text_follow_the_options_and_empty_ones_are_left_out(tmp_path: Path) -> None:
    file = tmp_path / "asked.txt"
    file.write_bytes(b"\xef\xbb\xbfone\r\n\n  \ntwo \xe2\x80\xa8 lines\n{}")
    assert read_prompts(["zero"], str(file), "a", LOADED) == [
        Asked("zero", "a"),
        Asked("one", "a", f"{file}:1"),
        Asked("two \u2028 lines", "a", f"{file}:4"),
        Asked("{}", "a", f"{file}:5"),
    ]


def test_a_line_of_json_may_name_its_adapter(tmp_path: Path) -> None:
    file = tmp_path / "asked.jsonl"
    file.write_text(
        '{"prompt": "one"}\n'
        '{"prompt": "two", "adapter": null}\n'
        '{"adapter": "b", "messages": [{"role": "user", "content": "Hi"}]}\n'
        '{"prompt": "four", "adapter": {"a": 0.7, "b": 1}}\n'
    )
    one, two, three, four = read_prompts([], str(file), "a", LOADED)
    assert (one.content, one.adapter, one.title) == ("one", "a", "one")
    assert (two.content, two.adapter) == ("two", None)
    assert (three.content, three.adapter, three.title) == (MESSAGES, "b", f"{file}:3")
    assert (four.content, four.adapter) == ("four", {"a": 0.7, "b": 1})


@pytest.mark.parametrize("file", [None, "-"])
def test_stdin_is_read_where_it_is_asked_for_or_nothing_is_given(
    monkeypatch: pytest.MonkeyPatch, file: str | None
) -> None:
    monkeypatch.setattr(sys, "stdin", Input(b"one\ntwo\n"))
    assert [one.content for one in read_prompts([], file, None, {})] == ["one", "two"]
    monkeypatch.setattr(sys, "stdin", Input(b'\n {"prompt": "one"}\n'))
    assert read_prompts([], file, None, {}) == [Asked("one", None, "stdin:2")]
    monkeypatch.setattr(sys, "stdin", Input(b" \n"))
    with pytest.raises(RequestError, match="stdin holds no prompts"):
        read_prompts([], file, None, {})


def test_a_terminal_is_not_waited_for_and_prompts_leave_stdin_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "stdin", Input(b"one\n", is_terminal=True))
    with pytest.raises(RequestError, match="--prompt-file"):
        read_prompts([], None, None, {})
    monkeypatch.setattr(sys, "stdin", Input(b"one\n"))
    assert read_prompts(["zero"], None, None, {}) == [Asked("zero")]
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(RequestError, match="--prompt-file"):
        read_prompts([], None, None, {})


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"{", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"prompt": "\\ud800"}', "not JSON"),
        (b'{"prompt": "\xff"}', "not UTF-8"),
        (b'{"prompt": "x", "prompt": "y"}', "stands twice"),
        (b"[]", "must be an object"),
        (b"{}", "one of prompt and messages"),
        (b'{"prompt": "x", "messages": []}', "one of prompt and messages"),
        (b'{"prompt": 1}', "prompt must be text"),
        (b'{"prompt": null}', "prompt must be text"),
        (b'{"messages": []}', "messages must be a list"),
        (b'{"messages": "x"}', "messages must be a list"),
        (b'{"messages": ["x"]}', "messages must be a list"),
        (b'{"prompt": "x", "max_tokens": 3}', "unknown field 'max_tokens'"),
        (b'{"prompt": "x", "adapter": 1}', "adapter must be a name"),
        (b'{"prompt": "x", "adapter": {"a": true}}', "adapter must be a name"),
        (b'{"prompt": "x", "adapter": "c"}', "--adapter c=FOLDER"),
        (b'{"prompt": "x", "adapter": {"a": 1, "c": 1}}', "--adapter c=FOLDER"),
    ],
)
def test_a_bad_line_is_named_with_its_file(tmp_path: Path, line: bytes, words: str) -> None:
    file = tmp_path / "asked.jsonl"
    file.write_bytes(b'{"prompt": "good"}\n\n' + line + b"\n")
    with pytest.raises(RequestError) as caught:
        read_prompts([], str(file), None, LOADED)
    assert str(caught.value).startswith(f"{file}:3: ")
    assert words in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.txt"):
        with pytest.raises(RequestError, match="cannot be read"):
            read_prompts([], str(path), None, {})


@pytest.mark.parametrize("use", ["c", {"a": 1.0, "c": 1.0}])
def test_the_adapter_for_all_must_be_loaded(use: str | dict[str, float]) -> None:
    with pytest.raises(RequestError, match=r"--use asks for 'c'.*--adapter c=FOLDER"):
        read_prompts(["x"], None, use, LOADED)
