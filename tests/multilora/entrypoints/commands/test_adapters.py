"""`multilora adapters pull`, `list`, `show` and `gc`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.harness.adapter_folders import CONFIG, write_adapter
from tests.harness.adapter_servers import serving
from tests.harness.command_line import run

if TYPE_CHECKING:
    from pathlib import Path

pytest.importorskip("typer")
pytest.importorskip("rich")


def test_what_was_pulled_is_listed_shown_and_removed(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    where = ("--cache-dir", tmp_path / "cache")
    write_adapter(tmp_path / "a", CONFIG, rank=16, base_model_name_or_path="me/base")
    with serving() as server:
        server.put("mine/a", tmp_path / "a")
        source = f"{server.url}/mine/a"
        status, out, errors = run(capsys, "adapters", "show", source, *where)
        assert (status, out) == (1, "")
        assert f"multilora adapters pull {source}" in errors
        assert run(capsys, "adapters", "list", *where) == (0, "", "")
        status, out, errors = run(capsys, "adapters", "pull", source, *where)
        assert (status, errors) == (0, "")
        folder = out.strip()
        assert run(capsys, "adapters", "pull", f"{source}b", *where)[0] == 1
    status, out, errors = run(capsys, "adapters", "list", *where)
    content = folder.rpartition("/")[2][:12]
    assert out.startswith(content)
    assert out.endswith(f"{source}\n")
    shown = [run(capsys, "adapters", "show", x, *where)[1] for x in (source, content, folder)]
    assert shown[0] == shown[1] == shown[2]
    for line in (f"folder   {folder}", "base     'me/base'", "rank     16", "kind     LoRA"):
        assert line in shown[0].splitlines()
    assert run(capsys, "adapters", "gc", *where)[0] == 2  # how much is to be said
    assert run(capsys, "adapters", "gc", "--max-bytes", "1GiB", *where)[1] != "0 bytes are left\n"
    assert run(capsys, "adapters", "gc", "--max-bytes", "0", *where)[1] == "0 bytes are left\n"
    assert run(capsys, "adapters", "list", *where) == (0, "", "")


def test_a_mistake_is_a_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    where = ("--cache-dir", tmp_path)
    for args, words in (
        (("pull", "hf://name"), "one has the form hf://org/name"),
        (("show", str(tmp_path / "none")), "adapter_config.json cannot be opened"),
        (("gc", "--max-bytes", "many"), "--max-bytes must be a size like 80GiB"),
    ):
        status, out, errors = run(capsys, "adapters", *args, *where)
        assert (status, out) == (1, "")
        assert words in errors
        assert errors.count("\n") == 1
