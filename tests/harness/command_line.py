"""The command line, called as a function."""

from __future__ import annotations

import pytest

from multilora.entrypoints import cli


def run(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of a command."""
    with pytest.raises(SystemExit) as exit_:
        cli.main([str(arg) for arg in args])
    captured = capsys.readouterr()
    assert isinstance(exit_.value.code, int)
    return exit_.value.code, captured.out, captured.err
