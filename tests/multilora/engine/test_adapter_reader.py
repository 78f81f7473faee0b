"""What an adapter's source becomes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from multilora.adapters.loader import AdapterSource
from tests.harness.tiny_engines import make_engine

if TYPE_CHECKING:
    from pathlib import Path


def test_reading_changes_nothing_and_gives_what_loading_does(root: Path) -> None:
    engine = make_engine(root / "base")
    found = engine._reader.read("a", AdapterSource(root / "a"))
    assert engine.adapters == {}
    assert engine.load_adapter("a", root / "a") == found.digest
    assert engine.adapters["a"].num_bytes == found.host.num_bytes
