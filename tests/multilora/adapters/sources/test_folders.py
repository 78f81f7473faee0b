"""A source becomes a folder: which may, how often it is fetched, and what is tried again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from multilora.adapters.sources import folders as module
from multilora.adapters.sources.cache import SourceCache
from multilora.adapters.sources.folders import SourceFolders
from multilora.errors import (
    AdapterError,
    AdapterInvalid,
    AdapterTooLarge,
    AdapterUnavailable,
)
from tests.harness.adapter_servers import Server, cut, redirect, reset, serving, stall, status

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.harness.adapter_servers import Answer, Handler

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def folders(server: Server, adapter: Path, tmp_path: Path) -> SourceFolders:
    server.put("mine/a", adapter)
    return SourceFolders([f"{server.url}/mine/"], SourceCache(tmp_path / "cache"))


def read(folders: SourceFolders, source: str, *, is_pinned: bool = False) -> bytes:
    with folders.folder(source, is_pinned=is_pinned) as folder:
        return (folder / WEIGHTS).read_bytes()


def gets(server: Server) -> int:
    return sum(asked == ("GET", f"/mine/a/{WEIGHTS}") for asked in server.asked)


def test_a_local_folder_is_itself(folders: SourceFolders, adapter: Path) -> None:
    for source in (adapter, str(adapter)):
        with folders.folder(source) as folder:
            assert folder == adapter


def test_no_source_is_allowed_unless_it_is_listed(server: Server, tmp_path: Path) -> None:
    folders = SourceFolders([], SourceCache(tmp_path))
    with pytest.raises(AdapterInvalid, match=r"the setting adapter_sources lists .* it is empty"):
        folders.check("hf://me/x")
    folders = SourceFolders(["hf://me/", "s3://mine/a/"], SourceCache(tmp_path))
    with pytest.raises(AdapterInvalid, match="it allows hf://me/, s3://mine/a/"):
        folders.check(f"{server.url}/a")
    assert server.asked == []


def test_a_missing_extra_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    folders = SourceFolders(["hf://", "s3://", "gs://", "https://"], SourceCache(tmp_path))
    for source, needs in (
        ("hf://me/x", r"huggingface_hub: pip install 'multilora\[hub\]'"),
        ("s3://b/x", r"fsspec and s3fs: pip install 'multilora\[remote\]'"),
        ("gs://b/x", r"fsspec and gcsfs: pip install 'multilora\[remote\]'"),
    ):
        with pytest.raises(AdapterInvalid, match=needs):
            folders.check(source)
    folders.check("https://host/x")  # needs none


def test_it_is_fetched_once_and_again_when_it_changed(
    folders: SourceFolders, server: Server, adapter: Path
) -> None:
    source, data = f"{server.url}/mine/a", (adapter / WEIGHTS).read_bytes()
    assert read(folders, source) == read(folders, source + "/") == data
    assert gets(server) == 1
    assert not any("README" in path for _, path in server.asked)
    server.files[f"/mine/a/{WEIGHTS}"] = b"other"
    assert read(folders, source, is_pinned=True) == data  # its digest is looked at by the reader
    assert read(folders, source) == b"other"
    assert gets(server) == 2


def test_what_was_damaged_in_the_cache_is_fetched_again(
    folders: SourceFolders, server: Server, adapter: Path, tmp_path: Path
) -> None:
    source = f"{server.url}/mine/a"
    read(folders, source)
    (weights,) = tmp_path.glob(f"cache/contents/*/{WEIGHTS}")
    weights.write_bytes(b"damaged")
    assert read(folders, source, is_pinned=True) == (adapter / WEIGHTS).read_bytes()
    assert gets(server) == 2


@pytest.mark.parametrize("kind", [stall, cut, reset])
def test_what_breaks_off_is_tried_again(
    kind: Callable[[bytes], Answer],
    folders: SourceFolders,
    server: Server,
    adapter: Path,
    tmp_path: Path,
) -> None:
    path, data = f"/mine/a/{WEIGHTS}", (adapter / WEIGHTS).read_bytes()
    bad = kind(data)

    def twice(handler: Handler) -> None:
        is_bad = handler.command == "GET" and gets(server) < 3
        (bad if is_bad else lambda h: h.give(data))(handler)

    server.answers[path] = [twice]
    assert read(folders, f"{server.url}/mine/a") == data
    assert gets(server) == 3
    server.answers[path] = [bad]
    server.files["/mine/b/adapter_config.json"] = b"{}"
    server.answers[f"/mine/b/{WEIGHTS}"] = [bad]
    with pytest.raises(AdapterUnavailable, match=r"/mine/b could not be fetched, in 3 attempts"):
        read(folders, f"{server.url}/mine/b")
    assert len(list(tmp_path.glob("cache/contents/*"))) == 1
    assert list(tmp_path.glob("cache/temporary/*")) == []


def test_an_unreachable_server_is_said(adapter: Path, tmp_path: Path) -> None:
    with serving() as server:
        server.put("mine/a", adapter)
        folders = SourceFolders([server.url], SourceCache(tmp_path))
        read(folders, f"{server.url}/mine/a")
    with pytest.raises(AdapterUnavailable, match="in 3 attempts"):
        read(folders, f"{server.url}/mine/a")
    read(folders, f"{server.url}/mine/a", is_pinned=True)  # nobody is asked


def test_what_the_server_refuses_is_not_tried_again(folders: SourceFolders, server: Server) -> None:
    server.answers[f"/mine/a/{WEIGHTS}"] = [status(403)]
    with pytest.raises(AdapterInvalid, match=f"{server.url}/mine/a: .* answers 403"):
        read(folders, f"{server.url}/mine/a")
    del server.answers[f"/mine/a/{WEIGHTS}"], server.files[f"/mine/a/{WEIGHTS}"]
    with pytest.raises(AdapterInvalid, match="there is no adapter_model"):
        read(folders, f"{server.url}/mine/a")


def test_a_server_leads_to_what_is_allowed_alone(
    folders: SourceFolders, server: Server, adapter: Path
) -> None:
    path, data = f"/mine/a/{WEIGHTS}", (adapter / WEIGHTS).read_bytes()
    server.files["/mine/other"] = data
    server.answers[path] = [redirect("/mine/other?signed=1")]
    assert read(folders, f"{server.url}/mine/a") == data
    with serving() as other:
        for place in (
            f"{other.url}/mine/a",
            f"{server.url}/theirs",
            "/mine/../theirs",
            "/mine/%2e%2e/theirs",
        ):
            server.answers[path] = [redirect(place)]
            with pytest.raises(AdapterInvalid, match="which adapter_sources does not allow"):
                read(folders, f"{server.url}/mine/a")
        assert other.asked == []


def test_sizes_are_bounded(
    server: Server, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.put("a", adapter)
    size = (adapter / WEIGHTS).stat().st_size
    folders = SourceFolders([server.url], SourceCache(tmp_path, max_bytes=size))
    with pytest.raises(AdapterTooLarge, match=f"left of adapter_cache_bytes={size}; raise that"):
        read(folders, f"{server.url}/a")
    monkeypatch.setitem(module.FILES, "adapter_config.json", 9)
    with pytest.raises(AdapterInvalid, match="more than 9, the limit of all adapters"):
        read(folders, f"{server.url}/a")


def test_a_cache_that_cannot_be_written_is_said(
    folders: SourceFolders, server: Server, tmp_path: Path
) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(AdapterError, match="could not be fetched"):
        read(folders, f"{server.url}/mine/a")
