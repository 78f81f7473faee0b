"""Servers and an adapter for the tests of sources."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from multilora.adapters.sources import folders, remote
from tests.harness.adapter_folders import CONFIG, write_adapter
from tests.harness.adapter_servers import Server, serving

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "READ_SECONDS", 0.3)
    monkeypatch.setattr(folders, "FIRST_PAUSE", 0.01)
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as server:
        yield server


@pytest.fixture(scope="session")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_adapter(tmp_path_factory.mktemp("adapter") / "a", CONFIG)
    (folder / "README.md").write_text("not needed")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder
