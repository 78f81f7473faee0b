"""The bounds of what is written."""

from __future__ import annotations

import io
import time

import pytest

from multilora.adapters.sources.remote import Interrupted, TooLong, write_all


def test_what_is_written_is_bounded_in_size_and_time() -> None:
    file, soon = io.BytesIO(), time.monotonic() + 60
    assert write_all([b"ab", b"c"], file, "x", 3, soon) == 3
    assert file.getvalue() == b"abc"
    with pytest.raises(TooLong, match="x has more than 2 bytes"):
        write_all([b"ab", b"c"], io.BytesIO(), "x", 2, soon)
    with pytest.raises(Interrupted, match="longer than 600 s"):
        write_all([b"ab"], io.BytesIO(), "x", 2, time.monotonic() - 1)
