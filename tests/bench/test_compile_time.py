"""What `bench/compile_time.py` refuses, it refuses in a line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import compile_time
import pytest


@pytest.mark.seconds
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--shape", "nope"], "'nope' is neither a folder with a config.json nor one of llama"),
        (["--shape", "llama-3.1-8b:x"], "must end in a number of layers"),
        (["--settings", '{"max_num_sequences": 1}'], "unknown setting 'max_num_sequences'"),
        (["--settings", "[1]"], "argument --settings: invalid json_object value: '[1]'"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(options: list[str], said: str) -> None:
    command = [sys.executable, str(Path(compile_time.__file__)), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    lines = [line for line in done.stderr.splitlines() if not line.startswith(("usage", " "))]
    assert len(lines) == 1, done.stderr
    assert said in lines[0]
