"""What an adapters.toml says, and that a wrong one says where."""

from __future__ import annotations

from pathlib import Path

import pytest

from multilora.adapters.loader import AdapterSource
from multilora.adapters.registry import read_registry
from multilora.errors import ConfigError

DIGEST = "3f" * 32


def write(folder: Path, text: str) -> Path:
    (folder / "adapters.toml").write_text(text)
    return folder / "adapters.toml"


def test_it_names_sources_digests_and_pins(tmp_path: Path) -> None:
    text = f"""
    [adapters]
    feedback = "jobs/feedback"
    absolute = "/srv/x"
    [adapters."me/proposal:1"]
    source = "hf://me/proposal@v3"
    digest = "{DIGEST}"
    pinned = true
    """
    assert read_registry(write(tmp_path, text)) == {
        "feedback": AdapterSource(tmp_path / "jobs/feedback"),
        "absolute": AdapterSource(Path("/srv/x")),
        "me/proposal:1": AdapterSource("hf://me/proposal@v3", DIGEST, True),
    }
    assert read_registry(write(tmp_path, "[adapters]")) == {}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("adapters = ", "cannot be read: Invalid value"),
        ("", "cannot be read: .*empty"),
        ("x = 1", r"must have a table \[adapters\], and nothing beside it"),
        ("[adapters]\n[other]", r"must have a table \[adapters\], and nothing beside it"),
        ("[adapters]\na = 5", "adapter 'a' in .*: it needs a source"),
        ("[adapters.a]\npinned = true", "it needs a source"),
        ('[adapters]\n"../a" = "x"', "name '../a' is not allowed"),
        ('[adapters.a]\nsource = "x"\npin = true', "it has no 'pin'; it may have source, digest"),
        ('[adapters.a]\nsource = "x"\npinned = 1', "pinned must be a bool, not 1"),
        ("[adapters.a]\nsource = 1", "source must be a str, not 1"),
        ('[adapters.a]\nsource = "x"\ndigest = "3f"', "a digest is 64 hexadecimal digits"),
    ],
)
def test_a_wrong_one_says_where(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        read_registry(write(tmp_path, text))
    assert "adapters.toml" in str(caught.value)


def test_a_missing_one_is_said(tmp_path: Path) -> None:
    for path in (tmp_path / "none.toml", tmp_path):
        with pytest.raises(ConfigError, match="cannot be"):
            read_registry(path)
    (tmp_path / "bytes.toml").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_registry(tmp_path / "bytes.toml")
