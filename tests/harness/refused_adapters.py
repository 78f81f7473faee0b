"""Adapter folders that must be refused, and safetensors files that no library writes."""

from __future__ import annotations

import json
import struct
from typing import TYPE_CHECKING, Any

import pytest

from multilora.adapters.peft.reader import read_adapter
from multilora.errors import AdapterError, AdapterInvalid
from tests.harness.adapter_folders import CONFIG

if TYPE_CHECKING:
    from pathlib import Path


def assert_refused(folder: Path, fragment: str, error: type[AdapterError] = AdapterInvalid) -> None:
    """Refused with a text that holds `fragment` and the folder."""
    with pytest.raises(error) as caught:
        read_adapter(folder, CONFIG)
    assert fragment in str(caught.value)
    assert folder.name in str(caught.value)
    assert len(str(caught.value)) < 1000


def packed(header: Any, data: bytes = b"\0\0\0\0") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data
