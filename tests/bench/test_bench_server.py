"""The bench of the server measures what it says; it asserts itself that both ways answer alike."""

from __future__ import annotations

import sys

import bench_server
import pytest


@pytest.mark.seconds
def test_streams_and_http_answer_alike(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = "--shape tiny --streams 6 --prompt 8 --tokens 12 --repeats 2 --interval 2"
    monkeypatch.setattr(sys, "argv", ["bench_server.py", *given.split()])
    bench_server.main()
    streams, http, ratio, *_ = capsys.readouterr().out.splitlines()[1].split()
    assert float(ratio) > 0
    assert 0 < min(float(streams), float(http)) < 1e6
