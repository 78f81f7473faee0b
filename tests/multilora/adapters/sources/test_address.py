"""Which texts are sources, and which of them are allowed."""

from __future__ import annotations

from pathlib import Path

import pytest

from multilora.adapters.sources.address import Address, is_allowed, parse
from multilora.errors import AdapterInvalid


@pytest.mark.parametrize("source", ["/a/b", "a", Path("hf://x/y"), "C:/x", "hf:/a/b"])
def test_what_has_no_scheme_is_a_folder(source: str | Path) -> None:
    assert parse(source) == Path(source)


@pytest.mark.parametrize(
    ("source", "is_fixed"),
    [
        ("hf://org/name", False),
        ("hf://org/name@v1.2/sub/folder", False),
        (f"hf://org/name@{'a' * 40}", True),
        ("s3://bucket/a@b/c", False),
        ("gs://bucket", False),
        ("https://host.example:8443/a/b/", False),
    ],
)
def test_an_address_keeps_its_text_but_for_a_slash_at_the_end(source: str, is_fixed: bool) -> None:
    found = parse(source)
    assert isinstance(found, Address)
    assert str(found) == source.removesuffix("/")
    assert found.is_fixed == is_fixed


@pytest.mark.parametrize(
    "source",
    [
        "ftp://host/a",
        "file:///a",
        "HF://org/name",
        "hf://",
        "hf://name",
        "hf://org/name@",
        "hf://org/name@a@b",
        "hf://org@x/name",
        "hf://org/name/../other",
        "s3://bucket/./a",
        "s3://bucket//a",
        "s3://bucket/a%2e%2e/b",
        "https://host/a?x=1",
        "https://host/a#b",
        "https://me@host/a",
        "https://host:port/a",
        "https://host\\@other/a",
        "https://host/a b",
        "https://host/a\n",
        "hf://org/n\u00e4me",
        "s3://" + "a/" * 1000,
    ],
)
def test_anything_else_is_refused(source: str) -> None:
    with pytest.raises(AdapterInvalid, match="source"):
        parse(source)


def test_a_prefix_ends_where_a_part_does() -> None:
    assert is_allowed("hf://me/x", ["s3://b/", "hf://me/"])
    assert is_allowed("hf://me/x@v1/sub", ["hf://me/x"])
    assert is_allowed("hf://me/x", ["hf://"])
    assert is_allowed("s3://b", ["s3://b/"])
    for address in ("hf://me-too/x", "hf://other/me", "s3://b@c/x", "https://me/x"):
        assert not is_allowed(address, ["hf://me", "s3://b"])
    assert not is_allowed("hf://me/x", [])
